"""Hundreds of wrong command lines: each ends by itself, with one line that says what is wrong, and never with 0.

A line is a string as one would type it; W is a scratch folder that holds the files made below. The slow test runs all
of them, in forks of one process per program and a part of them in fresh interpreters; CI runs those of FEW.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nitro_e.data.making import write_shard

ROOT = Path(__file__).parent.parent

RECIPE = """
name: tiny
run: W/run
model: {preset: micro-8}
stage: {kind: flow_matching, optim: {lr: 1e-3, warmup: 2}}
data: {shards: [W/data-*.tar], resolution: 64, workers: 0}
batch: {global: 2}
components: {codec: dct-f8c24, text: hash}
engine: {steps: 2, save_every: 2, sample_every: 0, log_every: 1, precision: float32, tracker: none, ema: {beta: 0.9}}
sampling: {steps: 1}
"""

# ---- train.py W/tiny.yaml KEY=VALUE --dry-run

# wrong for every real number
FRACTIONS = (".nan", ".inf", "-.inf", "-1", "x", "[1]", "{a: 1}", "null", "1e400", "true")
COUNTS = (".nan", ".inf", "-1", "1.5", "x", "[1]", "null", "1e99", "010", "1:30")  # wrong for every whole one
REAL_KEYS = """stage.optim.lr stage.optim.muon_lr stage.optim.eps stage.optim.weight_decay stage.optim.clip
    stage.optim.decay stage.timesteps.std stage.timesteps.shift stage.caption_dropout engine.ema.beta
    sampling.guidance_scale sampling.shift data.max_bad_fraction data.cache_gb model.mlp_ratio"""
COUNT_KEYS = """seed engine.steps engine.keep_every engine.sample_every engine.max_skips engine.keep_last stage.optim.warmup
    sampling.steps sampling.resolution batch data.workers data.tolerate_shards model.width model.heads
    model.position_table"""

OVERRIDES = """
    engine.ema.warmup_power=-1   engine.ema.warmup_power=.nan   stage.timesteps.mean=.nan   stage.optim.betas=[1,2]
    stage.optim.betas=[.nan,0.9]   stage.optim.betas=[0.9]   stage.optim.lr=1e6   engine.keep_last=1   engine.log_every=0
    engine.save_every=0   engine.tracker=mlflow   engine.compile=1   'engine.steps=['   'engine.steps=&a [*a]'   =5
    engine.steps   __class__=5   engine.posthoc_ema={every: 0}   'engine.posthoc_ema={sigma_rels: [.nan, 0.1]}'
    'engine={steps: 3, steps: 4}'   engine.steps=2024-13-45   data.workers=100000   batch=1e12   data.batch_size=4   engine.accumulate=2
    data.resolution=0   data.resolution=63   data.shards=foo   data.shards=[]   "data.shards=['']"   data.shards=[/tmp]
    data.shards=[W/none-*.tar]   data.shards=[@W/none]   data.shards=[@W/binary.txt]   "data.shards=['pipe:id']"
    "data.shards=['a-{5..1}.tar']"   data.shards=[W/zero.tar]   data.shards=[W/cut.tar]   data.shards=[W/empty.tar]
    data.captions={txt: -1}   data.captions={txt: .nan}   data.captions={txt: 0}   data.captions={nope: 1}
    'data.where={width: 5}'   'data.where={width: "=> 5"}'   'data.where={nope: ">= 5"}'   data.buckets=[64]
    data.buckets=[0x64]   data.buckets=[63x64]   data.buckets=[64x64,64x64]   resume.allow=[seed]   resume.allow=data
    data=null   'data.sources={a: {shards: []}}'   'data.sources={a: {shards: [W/data-0.tar], weight: .nan}}'
    model.preset=nope   model.preset=[1]   model.latent_channels=5   model.width=49   model.heads=7   model.attention=[]
    "model.attention=['0x0']"   model.compression=[1]   model.compression=[3]   model.compression=[2,2]
    model.groups=[0,0,0]   model.groups=[1000000,1,1]   model.groups=[1,1]   model.text_mask=maybe   model.base_grid=0
    model.position_table=1e9   model.position_table=1   model.mlp_ratio=1e30   components=null   components.codec=foo
    components.text.name=   'components.text={name: hash, length: 1}'   'components.text={name: hash, length: 1e9}'
    components.vision=dinov2-b14   stage=null   stage.kind=foo   stage.kind=[1]   stage.kind=null   stage.kind={}
    stage.optim.lr=1e-3x   stage.caption_dropout=2   sampling.sampler=ddim   'sampling.sigmas=[[1,.nan]]'
    sampling.steps=1e12   prompts=5   prompts=[5]   'prompts=["\\ud800"]'   evaluation={every: 0}
    'evaluation={prompts: nope, rewards: [shapes]}'   'evaluation={prompts: W/binary.txt, rewards: []}'
    'evaluation={prompts: shapes-heldout, rewards: [foo]}'   name=../../evil   name=a/b   name=..   name=.x   "name=''"
    'name="a\\nb"'   'name="a\\0b"'   name=   seed=abc   seed=1e30
"""

# ---- files in place of the recipe

RECIPES = {
    "empty": b"",
    "list": b"- 1\n- 2\n",
    "scalar": b"5\n",
    "latin": "name: caf\xe9\n".encode("latin-1"),
    "utf16": RECIPE.encode("utf-16"),
    "nul": b"name: a\0b\n",
    "tab": b"name:\n\t- x\n",
    "twice": (RECIPE + "seed: 1\nseed: 2\n").encode(),
    "section_twice": (RECIPE + "engine: {steps: 9}\n").encode(),
    "octal": (RECIPE + "seed: 0777\n").encode(),
    "sexagesimal": (RECIPE + "seed: 1:30\n").encode(),
    "python": (RECIPE + "prompts: !!python/object/apply:os.system ['true']\n").encode(),
    "anchor_loop": (RECIPE + "prompts: &a [*a]\n").encode(),
    "deep": b"name: " + b"[" * 100_000,
    "deep_closed": b"name: " + b"[" * 900 + b"]" * 900,
    "deep_mapping": b"{a: " * 20_000,
    "key_list": (RECIPE + "? [1]\n: 2\n").encode(),
    "number_key": (RECIPE + "5: 2\n").encode(),
    "null_key": (RECIPE + "null: 2\n").encode(),
    "misspelt": (RECIPE + "sede: 2\n").encode(),
    "huge_number": (RECIPE + f"seed: {'9' * 5000}\n").encode(),
    "big_number": (RECIPE + f"seed: 1{'0' * 400}\n").encode(),
    "no_name": RECIPE.replace("name: tiny", "").encode(),
    "null_name": RECIPE.replace("name: tiny", "name: null").encode(),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
}

# ---- sample.py SOURCE --prompt "a red circle" --steps 1 --out W/out ...

SAMPLE = """
    --device foo   --device meta   --device cuda:99   '--device '   --seed 1e30   --seed -1   --seed x   --seed nan
    --seed 9223372036854775808   --steps 0   --steps -1   --steps abc   --steps 1e3x   --steps 1000000000   --guidance nan
    --guidance inf   --guidance -5   --guidance x   --guidance 1e400   --num-images 0   --num-images -1   --num-images 1e8
    --num-images 1000000000   --batch-size 0   --batch-size -3   --batch-size 1e30   --height 0   --height -8   --height 65
    --height 1000000   --height 1e30   --width 65   --width x   --sampler foo   --dtype foo   --codec W   --text W
    --processes 0   --processes x   --processes 1e9
    --unknown 1   --prompts-file W/none   --prompts-file W/binary.txt   --prompts-file W   --prompt SURROGATE
    --aspect x   --aspect 4   --aspect 0:1   --aspect nan:1   '--aspect 1:1 --height 64'
    --negative-prompt SURROGATE   --out W/binary.txt   --out /proc/x   --guidance-by foo   --guidance-by path
    --guidance-rescale foo   --optimize-noise foo   --optimize-noise shapes   --noise-steps 3   --noise-candidates 4
    --noise-candidates 1   --noise-steps -1   --noise-steps x
"""
SOURCES = """'' @ema W W/none W/run@foo W/binary.txt W/run/checkpoints/step-0000002/model/model.safetensors /dev/null
    shapes@foo W/models/truncated W/models/empty W/models/no_weights W/models/pickle W/models/header W/models/config_binary
    W/models/config_deep W/models/config_deep_model W/models/config_list W/models/config_none W/models/config_number
    W/models/use_int W/models/use_nan W/models/width_huge W/models/table_huge W/models/big_int W/models/kind_list"""

# ---- the tools

DATA = "W/data-0.tar"
TOOLS = {
    "data": f"""
        ; foo ; pack ; pack foo W --out W/o ; pack folder W/none --out W/o ; pack folder W/empty_folder --out W/o
        pack folder W/images --out W/o/p1 ; pack folder W/images --captions-from-names --out W/o/p2 --resize -5
        pack folder W/images --captions-from-names --out W/o/p3 --resize 0
        pack folder W/images --captions-from-names --out W/o/p4 --samples-per-shard 0
        pack folder W/images --captions-from-names --out W/o/p5 --processes 0
        pack folder W/images --captions-from-names --out W/o/p5 --processes 100000
        pack folder W/images --captions-from-names --out W/o/p6 --min-side -1
        pack folder W/images --captions-from-names --out W/o/p7 --max-bad-fraction nan
        pack folder W/images --captions-from-names --out W/o/p8 --max-bad-fraction 7
        pack folder W/images --captions-from-names --out W/o/p9 --shuffle 1e30
        pack folder W/images --captions-from-names --out W/o/pc --max-aspect nan
        pack folder W/images --captions-from-names --out W/o/pd --max-aspect 0.5
        pack table W/columns.csv --out W/o/pe --keep none
        pack folder W/images --captions-from-names --out W/o/pa --name ../x
        pack folder W/images --captions W/latin.csv --out W/o/pb ; pack table W/latin.csv --out W/o/t1
        pack table W/lists.jsonl --out W/o/t2 ; pack table W/numbers.jsonl --out W/o/t3 ; pack table W/deep.jsonl --out W/o/t4
        pack table /etc/passwd --out W/o/t5 ; pack table W/binary.txt --out W/o/t6 ; pack table W/none.csv --out W/o/t7
        pack table W/columns.csv --out W/o/t8 ; pack table W/object.json --out W/o/t9 ; pack table W/bad.csv.gz --out W/o/ta
        pack table W/bad.parquet --out W/o/tb ; pack webdataset W/cut.tar --out W/o/w1 ; pack webdataset W/zero.tar --out W/o/w2
        pack sa1b {DATA} --out W/o/s1 ; pack sa1b {DATA} --captions W/latin.csv --out W/o/s2 ; pack journeydb W --out W/o/j1
        index W/none ; index W/zero.tar ; verify W/zero.tar ; index W/cut.tar ; index W/empty.tar ; index W/binary.txt ; index {DATA} --processes 0
        verify W/none ; verify W/cut.tar ; verify W/damaged/data-0.tar ; verify {DATA} --processes -1
        stats W/cut.tar ; stats W/zero.tar ; stats {DATA} --probe -1 ; head {DATA} --count -1 ; head {DATA} --count 0
        head W/broken.tar ; head W/no_image.tar --sheet W/o/x.png ; stats W/broken.tar ; stats W/no_image.tar
        verify W/broken.tar --deep ; encode W/broken.tar --out W/o/ej --codec dct-f8c24 --resolution 64
        pack webdataset W/broken.tar --out W/o/w3 ; head W/cut.tar ; head W/zero.tar ; head {DATA} --sheet /proc/x.png
        which W/none --step 1 ; which W/tiny.yaml ; which W/tiny.yaml --step -1 ; which W/tiny.yaml --step 1e20
        which W/tiny.yaml --step nan
        which W/recipes/latin.yaml --step 1 ; which W/tiny.yaml seed=.nan --step 1
        encode {DATA} --out W/o/e1 ; encode {DATA} --out W/o/e2 --codec foo ; encode W/cut.tar --out W/o/e3 --codec dct-f8c24
        encode W/zero.tar --out W/o/e4 --codec dct-f8c24 --resolution 64 ; encode {DATA} {DATA} --out W/o/e5 --codec dct-f8c24
        encode {DATA} --out W/o/e6 --codec dct-f8c24 --resolution 0 ; encode {DATA} --out W/o/e7 --codec dct-f8c24 --workers -1
        encode {DATA} --out W/o/e8 --codec dct-f8c24 --batch-size 0 ; encode {DATA} --out W/o/e9 --codec dct-f8c24 --device foo
        encode {DATA} --out W/o/ea --codec dct-f8c24 --resolution 64 --max-bad-fraction nan
        encode {DATA} --out W/o/eb --codec dct-f8c24 --rank 3 --world 2 ; encode {DATA} --out W/o/ec --vision shapes-vit
        encode {DATA} --out W/o/ed --codec dct-f8c24 --world 0 ; encode {DATA} --out W/o/ee --codec dct-f8c24 --rank -1
        encode {DATA} --out W/o/ef --vision shapes-vit --grid 0 0 ; encode {DATA} --out W/o/eg --text hash --text-length -1
        encode {DATA} --out W/o/eh --text hash --text-length 99999999999 ; encode {DATA} --out W/o/ei --codec dct-f8c24 --resolution 1e9
        encode {DATA} --out W/o/ej --text hash --text-layers normed_mean ; encode {DATA} --out W/o/ek --text hash --text-layers x
        encode {DATA} --out W/binary.txt --codec dct-f8c24 --resolution 64""",
    "serve": """
        W/none ; W/binary.txt ; shapes W/none ; shapes@foo ; W/models/empty ; shapes --port 0 ; shapes --port -1
        shapes --port 65536 ; shapes --port x ; shapes --port nan ; shapes --port 1.5 ; shapes --host 192.0.2.1
        shapes --host '' ; shapes --host nowhere.invalid ; shapes --host ::1 ; shapes --host 1.2.3.4.5 ; shapes --device foo
        shapes --device cuda:99 ; shapes --dtype foo ; shapes --codec W --port 17861 ; shapes --text W --port 17862
        shapes --share ; shapes --api yes ; W/models/use_nan --port 17863 ; W/models/truncated --port 17864""",
    "reward_server": """
        ; foo ; shapes shapes ; '{name: shapes, weight: nan}' ; '[shapes]' ; '{' ; shapes --port 0 ; shapes --port x
        shapes --port 65536 ; shapes --host 192.0.2.1 ; shapes --host nowhere.invalid ; shapes --device foo
        '{name: shapes, options: {score: foo}}' ; os:system ; 'remote' ; W/binary.txt
        '{name: remote, options: {url: foo}}' ; '{name: remote, options: {url: "http://127.0.0.1:9"}}'""",
    "evaluate": """
        ; foo shapes ; shapes ; shapes W/none --num 2 ; shapes shapes --num -3 ; shapes shapes --num 1e30 ; shapes shapes --num 0
        shapes shapes --num 2 --steps 0 --out W/o/v1 ; shapes shapes --num 2 --steps 1 1000000000 --out W/o/v2
        shapes shapes --num 2 --steps 1 --guidance nan --out W/o/v3 ; shapes shapes --num 2 --steps 1 --guidance inf --out W/o/v4
        shapes shapes --num 2 --steps 1 --guidance 1 -2 --out W/o/v5 ; shapes shapes --num 2 --steps 1 --sampler foo --out W/o/v6
        shapes shapes --num 2 --steps 1 --device foo --out W/o/v7 ; shapes shapes --num 2 --batch-size 0 --out W/o/v8
        shapes shapes --num 2 --steps 1 --seed 1000000000000000000000000000000 --out W/o/v9
        shapes shapes --num 2 --steps 1 --seed -1 --out W/o/va ; shapes shapes --num 1 --per-prompt 0
        shapes shapes --num 2 --steps 1 --out W/binary.txt ; W/ok.txt shapes ; W/ok.txt shapes --reward foo
        W/ok.txt shapes --reward os:system ; W/ok.txt shapes --reward shapes --reward-option x
        W/ok.txt shapes --reward shapes --reward-option 'k=!!python/object/apply:os.system [true]'
        W/ok.txt shapes --reward shapes --reward-option k=[1] ; W/ok.txt shapes --reward shapes --reward-option k=.nan
        W/binary.txt shapes --reward shapes --out W/o/vb ; W/deep.jsonl shapes --reward shapes --out W/o/vc
        W/lists.jsonl shapes --reward shapes --out W/o/vd ; W/none.txt shapes --reward shapes ; W/blank.txt shapes --reward shapes
        W/surrogate.jsonl shapes --reward shapes --out W/o/ve ; shapes shapes --num 2 --processes 0 ; shapes shapes --processes x""",
    "synthesize": """
        ; shapes --out W/o ; W/none --prompts W/ok.txt --out W/o/y1 ; shapes --prompts W/none.txt --out W/o/y2
        shapes --prompts W/binary.txt --out W/o/y3 ; shapes --prompts W/lists.jsonl --out W/o/y4 ; shapes --prompts W --out W/o/y5
        shapes --prompts W/deep.jsonl --out W/o/y6 ; shapes --prompts W/blank.txt --out W/o/y7
        shapes --prompts W/surrogate.jsonl --out W/o/y8 ; shapes --prompts W/ok.txt --limit -1 --out W/o/y9
        shapes --prompts W/ok.txt --limit 0 --out W/o/ya ; shapes --prompts W/ok.txt --per-prompt 0 --out W/o/yb
        shapes --prompts W/ok.txt --per-prompt 1e9 --out W/o/yc ; shapes --prompts W/ok.txt --steps 0 --out W/o/yd
        shapes --prompts W/ok.txt --steps 1 --guidance nan --out W/o/ye ; shapes --prompts W/ok.txt --batch-size 0 --out W/o/yf
        shapes --prompts W/ok.txt --std a,b --out W/o/yg ; shapes --prompts W/ok.txt --std nan,1 --out W/o/yh
        shapes --prompts W/ok.txt --max-abs nan --out W/o/yi ; shapes --prompts W/ok.txt --max-abs -1 --out W/o/yj
        shapes --prompts W/ok.txt --trajectory foo --out W/o/yk ; shapes --prompts W/ok.txt --trajectory nan --out W/o/yl
        shapes --prompts W/ok.txt --height 65 --out W/o/yz ; shapes --prompts W/ok.txt --width 0 --out W/o/yzz
        shapes --prompts W/ok.txt --rank 5 --out W/o/ym ; shapes --prompts W/ok.txt --max-bad-fraction nan --out W/o/yn
        shapes --prompts W/ok.txt --seed 1e30 --out W/o/yo ; shapes --prompts W/ok.txt --device foo --out W/o/yp
        shapes --prompts W/ok.txt --samples-per-shard 0 --out W/o/yq ; shapes --prompts W/ok.txt --steps 1 --out W/binary.txt
        --pipeline /nope --prompts W/ok.txt --out W/o/yr ; shapes --prompts W/ok.txt --min-reward shapes --out W/o/ys
        shapes --prompts W/ok.txt --min-reward shapes=nan --out W/o/yt ; shapes --prompts W/ok.txt --min-reward foo=1 --out W/o/yu
        shapes --prompts W/ok.txt --min-reward shapes=1 --out W/o/yv ; --prompts W/ok.txt --out W/o/yw
        W/run --pipeline x --prompts W/ok.txt --out W/o/yx""",
    "make_shapes": """
        ; W/o/m1 --num 0 ; W/o/m2 --num x ; W/o/m3 --num 1000000000000 ; W/o/m4 --seed -1 ; W/o/m5 --num 3 --seed 1000000000000000000000
        W/o/m6 --samples-per-shard 0 ; W/o/m7 --split foo ; W/o/m8 --tasks counting counting ; W/o/m9 --resolution 1
        W/o/ma --resolution 100000 --num 1 ; W/binary.txt --num 4 ; /proc/x --num 4 ; W/damaged --num 4 --split heldout""",
    "convert": """; W x ; shapes W/o/c1 --to-released ; W/binary.txt W/o/c2 ; W/models/config_deep W/o/c3
        W/models/config_binary W/o/c4 ; W/models/truncated W/o/c5 ; shapes W/binary.txt ; shapes W/o/c6 --dtype foo""",
    "export": """; shapes W/o/f1 ; shapes W/o/f2 --onnx --torch ; shapes W --diffusers ; shapes W/binary.txt --onnx
        W/none W/o/f3 --diffusers ; W/binary.txt W/o/f4 --onnx ; W/models/truncated W/o/f5 --torch ; W/run W/o/f6 --diffusers
        shapes W/o/f7 --diffusers --prompt x ; shapes W/o/f8 --onnx --dtype float16 ; shapes W/o/f9 --torch --prompt SURROGATE
        shapes W/o/fa --diffusers --dtype foo ; shapes W/o/fb --diffusers --codec W ; shapes W/o/fc --onnx --lora W/none
        shapes W/o/fd --torch --resolution 7 ; shapes /proc/x --diffusers ; W/models/config_deep W/o/fe --diffusers""",
    "describe": """; nope ; W ; W/binary.txt ; /etc/passwd ; nitro-e-512 --foo ; W/recipes/latin.yaml ; W/recipes/deep.yaml
        nitro-e-512 --grid 0x0 ; nitro-e-512 --grid x ; nitro-e-512 --text-length -1 ; nitro-e-512 --text-length 1e12
        nitro-e-512 mlp_ratio=.nan ; nitro-e-512 width=010 ; nitro-e-512 groups=[1000000,1,1]
        nitro-e-512 text_compression=0 ; nitro-e-512 text_compression=3 ; nitro-e-512 path_drop=1.5 ; nitro-e-512 prediction=x""",
    "ema": """; foo ; list W ; list W/none ; synthesize W/none --sigma-rel 0.08 --out W/o/x1
        synthesize W/run --sigma-rel nan --out W/o/x2 ; synthesize W/run --sigma-rel x --out W/o/x3""",
    "report": """; W ; W/none ; W/binary.txt ; W/run W/run --out /etc/passwd/x""",
    "demo": """--recipes W ; --recipes W/none --out W/o/d1 ; --num 0 ; --num x ; --scenes 1 ; --scenes nan ; --processes 0
        --processes 1e9 ; foo ; --num 12 --out W/ok.txt ; --num 12 --out /proc/x""",
    "rehearse": """; W/none ; W/tiny.yaml --steps 0 ; W/tiny.yaml --batch x ; W/tiny.yaml --computed pixels ; W/tiny.yaml --gpus 0
        W/tiny.yaml --price nan ; W/ok.txt ; W/binary.txt ; W/tiny.yaml model.widht=3""",
    "study": """; W/none ; W/ok.txt ; W/binary.txt ; W/recipes/deep.yaml ; W/recipes/twice.yaml ; W/recipes/empty.yaml
        W/study.yaml --jobs 0 ; W/study.yaml --only nobody ; W/study_outside.yaml ; W/study.yaml --run -1 ; W/study.yaml --run 5
        W/study.yaml seeds=[] ; W/study.yaml seeds=[-1] --list ; W/study.yaml equal=[x] ; W/study.yaml grid={a:[1]}
        W/study.yaml validation={shards:[W/none.tar],times:[2]} ; W/study.yaml base=null ; W/study.yaml compare_to=x""",
    "speedrun": """; x ; x W/none ; x W/binary.txt ; ../x W/tiny.yaml ; x W/tiny.yaml foo ; x W/tiny.yaml --num 0 ; x W/tiny.yaml --num x
        x W/tiny.yaml --benchmark foo ; x W/tiny.yaml --setting steps=0 ; x W/tiny.yaml --setting foo ; x W/tiny.yaml init_from=shapes
        x W/tiny.yaml --table W/ok.txt ; x --rebuild --table W/binary.txt ; x W/recipes/deep.yaml ; x W/tiny.yaml engine.steps=0""",
    "train_components": """; foo ; codec --steps 0 --out W/o/n1 ; codec --steps x ; codec --seed 1e30 ; codec --seed -1""",
    "benchmark": """; foo ; model --batch 0 ; engine --rounds 0 ; sample --steps 0 ; sample --guidance nan
        sample --shapes --preset nitro-e-512 ; engine --threads 1e9 ; data --shards -1 ; model --seconds nan""",
}

# ---- what is right, so that not everything is refused; and what is wrong but said in another way

RIGHT = {
    "train.py": [
        "W/tiny.yaml --dry-run",
        "W/tiny.yaml --dry-run seed=3 engine.steps=1e3",
        "--dry-run W/tiny.yaml seed=3",
    ],
    "sample.py": [
        "W/run --prompt 'a red circle' --out W/out",
        "W/run --prompt '' --seed 9223372036854775 --out W/out",
        "shapes --prompt '🚀 ../../etc/passwd \u202e' --steps 1 --guidance 0 --device cpu --out W/out",
    ],
    "tools/data.py": [
        f"index {DATA}",
        f"head {DATA} --count 1",
        "which W/tiny.yaml --step 1",
        "pack folder W/images --captions-from-names --out W/o/right --resize 8",
    ],
    "tools/report.py": ["W/damaged_run"],
    "tools/evaluate.py": ["shapes shapes --num 2 --steps 1 --out W/o/right_v"],
    "tools/synthesize.py": ["shapes --prompts W/ok.txt --limit 1 --steps 1 --out W/o/right_y"],
    "tools/make_shapes.py": ["W/o/right_m --num 3"],
    "tools/export.py": ["shapes W/o/right_f --diffusers"],
}
# answers "1 problems" and 1
FOUND_FAULTY = {"tools/data.py": {"verify W/cut.tar", "verify W/broken.tar --deep"}}

FEW = {  # at once, in this process
    "train": [
        f"W/tiny.yaml {words} --dry-run"
        for words in (
            "stage.optim.clip=.nan",
            "engine.keep_every=-1",
            "engine.steps=010",
            "name=../../evil",
            "model.preset=[1]",
            "data.shards=[W/zero.tar]",
            "'data.where={width: \"=> 5\"}'",
            "'data.where={nope: \">= 5\"}'",
            "'data.captions={txt: 0}'",
            "data.buckets=[64x72]",
            "resume.allow=[seed]",
        )
    ]
    + ["W/recipes/latin.yaml", "W/recipes/deep.yaml", "W/recipes/section_twice.yaml"],
    "sample": [
        "shapes --prompt x --device foo",
        "shapes --prompt x --seed 1e30",
        "shapes --prompt SURROGATE",
        "shapes --prompts-file W/binary.txt",
        "W/ok.txt --prompt x",
    ],
    "data": [
        "pack table W/lists.jsonl --out W/o",
        "pack table /etc/passwd --out W/o",
        "pack table W/deep.jsonl --out W/o",
        "pack folder W/images --out W/o",
        "pack folder W/images --resize -5 --captions-from-names --out W/o",
        "index W/zero.tar",
        "head W/broken.tar",
        "stats W/no_image.tar",
        "which W/tiny.yaml --step -1",
        "encode W/data-0.tar --vision shapes-vit --grid 0 0 --out W/o",
        "encode W/data-0.tar --codec dct-f8c24 --buckets 8x --out W/o",
        "encode W/data-0.tar --codec dct-f8c24 --buckets 9x9 --workers 0 --out W/o/bucket",
        "encode W/data-0.tar --text hash --caption a.b --out W/o",
        "encode W/data-0.tar --text hash --caption none --workers 0 --out W/o/caption",
        "pack table W/columns.csv --keep none --out W/o",
        "pack folder W/images --captions-from-names --max-aspect nan --out W/o",
        "verify W/damaged/data-0.tar",
        "encode W/data-0.tar --codec dct-f8c24 --resolution 64 --max-bad-fraction nan --out W/o",
    ],
    "serve": ["shapes --port 0", "shapes --host nowhere.invalid", "W/binary.txt"],
    "reward_server": ["foo", "shapes shapes", "shapes --port 0", "[shapes]"],
    "evaluate": [
        "W/ok.txt shapes --reward shapes --reward-option k=!!python/object/apply:os.system",
        "W/lists.jsonl shapes --reward shapes",
    ],
    "synthesize": [
        "shapes --prompts W/ok.txt --limit -1 --out W/o",
        "shapes --prompts W/ok.txt --max-abs nan --out W/o",
    ],
    "study": ["W/binary.txt", "W/study_outside.yaml"],
}


def make_files(folder: Path) -> None:
    """All that stands as W/... above, but for the run and models."""
    pixels = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    (folder / "images").mkdir()
    (folder / "empty_folder").mkdir()
    for index in range(4):
        Image.fromarray(pixels + index).save(folder / "images" / f"a_red_fox_{index}.png")
    png = (folder / "images/a_red_fox_0.png").read_bytes()
    write_shard(
        folder / "data-0.tar", [{"__key__": f"{i:04d}", "png": png, "txt": "a fox"} for i in range(8)]
    )
    broken = {"__key__": "0", "png": b"no image", "txt": b"\xff", "json": b"[1", "npy": b"no array"}
    write_shard(folder / "broken.tar", [broken])
    write_shard(folder / "no_image.tar", [{"__key__": "0", "png": b"no image", "txt": "a fox"}])
    (folder / "cut.tar").write_bytes((folder / "data-0.tar").read_bytes()[:5000])
    (folder / "zero.tar").write_bytes(bytes(10240))
    (folder / "empty.tar").write_bytes(b"")
    (folder / "damaged").mkdir()
    shutil.copy(folder / "data-0.tar", folder / "damaged")
    (folder / "damaged/manifest-images.jsonl").write_text('{"shard": 5}\n')
    (folder / "damaged/shapes-heldout.json").write_text("[1, 2\n")
    (folder / "damaged_run").mkdir()
    rows = [
        {"step": "1", "attempt": 1},
        {"step": 1, "attempt": "x", "loss": 1.0},
        [1],
        {"step": 2, "attempt": 1, "loss": 1.0},
    ]
    (folder / "damaged_run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "damaged_run/config.yaml").write_bytes(b"[" * 5000)
    (folder / "damaged_run/STATUS.json").write_bytes(b"\xff[")
    recipe = RECIPE.replace("W/", f"{folder}/")
    (folder / "tiny.yaml").write_text(recipe)
    (folder / "recipes").mkdir()
    for name, content in RECIPES.items():
        (folder / "recipes" / f"{name}.yaml").write_bytes(content)
    texts = {
        "binary.txt": bytes(range(128, 256)),
        "latin.csv": "image,caption\na.png,caf\xe9\n".encode("latin-1"),
        "lists.jsonl": b"[1, 2]\n",
        "numbers.jsonl": b"1\n",
        "deep.jsonl": b"[" * 100_000 + b"\n",
        "object.json": b'{"image": 1',
        "columns.csv": b"a,b\n1,2\n",
        "bad.csv.gz": b"\x1f\x8b not gzip",
        "bad.parquet": b"PAR1 not parquet",
        "ok.txt": b"a red circle\n",
        "blank.txt": b"\n\n",
        "surrogate.jsonl": b'{"prompt": "a \\ud800 circle"}\n',
        "study.yaml": b"{name: s, base: shapes, variants: {a: {}}, settings: [{steps: 1}]}",
        "study_outside.yaml": b"{name: ../../s, base: shapes, variants: {a: {}}, settings: [{steps: 1}]}",
    }
    for name, content in texts.items():
        (folder / name).write_bytes(content)


def make_models(folder: Path) -> None:
    """A run of two steps, and damaged copies of its model folder."""
    train = [sys.executable, str(ROOT / "train.py"), str(folder / "tiny.yaml")]
    subprocess.run(train, check=True, capture_output=True, env=environment())
    whole = folder / "run/checkpoints/step-0000002/model"
    weights, about = (
        (whole / "model.safetensors").read_bytes(),
        json.loads((whole / "config.json").read_text()),
    )

    def model(name: str, config: bytes | dict | None = None, content: bytes | None = weights) -> None:
        place = folder / "models" / name
        place.mkdir(parents=True)
        config = about if config is None else config
        (place / "config.json").write_bytes(
            config if isinstance(config, bytes) else json.dumps(config).encode()
        )
        if content is not None:
            (place / "model.safetensors").write_bytes(content)

    model("truncated", content=weights[:1000])
    model("empty", content=b"")
    model("no_weights", content=None)
    model("pickle", content=b"\x80\x04\x95" + bytes(100))
    model("header", content=(2**63).to_bytes(8, "little") + weights[8:])
    model("config_binary", b"\xff\xfe\x00")
    model("config_deep", b"[" * 100_000)
    model("config_deep_model", b'{"format": 1, "model": ' + b"[" * 900 + b"]" * 900 + b"}")
    model("config_list", b"[]")
    model("config_none", b"")
    model("config_number", b"5")
    model("use_int", about | {"use": 5})
    model("use_nan", about | {"use": about["use"] | {"sampling": {"guidance_scale": float("nan")}}})
    model("width_huge", about | {"model": about["model"] | {"width": 4_000_000_000}})
    model("table_huge", about | {"model": about["model"] | {"position_table": 1_000_000}})
    model("big_int", json.dumps(about | {"model": about["model"] | {"mlp_ratio": 10**400}}).encode())
    model("kind_list", about | {"use": about["use"] | {"codec": {"name": [1]}}})


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}


def arguments_of(line: str, folder: Path) -> list[str]:
    words = [re.sub(r"(?<![\w.])W(?![\w.])", str(folder), word) for word in shlex.split(line)]
    return [word.replace("SURROGATE", "a \udcff circle") for word in words]


def pairs(text: str) -> list[str]:
    """Options with their values: "--a 1 --b 2" -> ["--a 1", "--b 2"]."""
    return [part.strip() for part in re.split(r"\s(?=--)", f" {text.strip()}") if part.strip()]


def wrong_lines() -> dict[str, list[str]]:
    """Program -> command lines that it must refuse."""
    overrides = [
        f"{key}={value}"
        for key, value in itertools.chain(
            itertools.product(REAL_KEYS.split(), FRACTIONS), itertools.product(COUNT_KEYS.split(), COUNTS)
        )
    ]
    overrides = [shlex.quote(override) for override in overrides]
    written = re.findall(r"""'[^']*'|"[^"]*"|\S+\{[^}]*\}|\S+""", OVERRIDES)
    overrides += [word if word[0] in "'\"" else shlex.quote(word) for word in written]
    train = [f"W/tiny.yaml {override} --dry-run" for override in overrides]
    train += [f"W/recipes/{name}.yaml" for name in RECIPES]
    train += [
        "",
        "W",
        "W/none.yaml",
        "/dev/null",
        DATA,
        "W/tiny.yaml --foo",
        "W/tiny.yaml run=W/binary.txt/x",
    ]
    sample = [f"shapes --prompt 'a red circle' --steps 1 --out W/out {option}" for option in pairs(SAMPLE)]
    sample += [f"{source} --prompt 'a red circle' --steps 1 --out W/out" for source in SOURCES.split()]
    sample += ["", "shapes", "shapes --prompts-file W/blank.txt"]
    tools = {
        f"tools/{name}.py": [line.strip() for line in re.split(r";|\n", text.strip())]
        for name, text in TOOLS.items()
    }
    return {"train.py": train, "sample.py": sample, **tools}


def fault(code: int | None, stderr: str, right: bool, program: str, line: str) -> str | None:
    """What is wrong with the way a command ended, or None."""
    if code is None:
        return "hangs"
    if "Traceback" in stderr:
        return f"traceback: {stderr.strip().splitlines()[-1]}"
    if right:
        return None if code == 0 else f"refused: {stderr[-200:]}"
    if code == 0:
        return "accepted"
    if code == 1 and line in FOUND_FAULTY.get(program, ()):
        return None
    if code not in (2, 3):
        return f"code {code}"
    said = [
        part
        for part in re.split(r"[\r\n]", stderr)
        if re.match(r"([\w.]+\.py.*: )?error: |training stopped: ", part)
    ]
    return None if len(said) == 1 else f"{len(said)} lines of error: {stderr[-300:]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    make_files(path)
    return path


FEW_LINES = [(program, line) for program, lines in FEW.items() for line in lines]


@pytest.mark.parametrize("program, line", FEW_LINES, ids=[f"{program} {line}" for program, line in FEW_LINES])
def test_wrong_command_lines(folder, capsys, monkeypatch, program, line):
    import importlib

    monkeypatch.setattr(sys, "argv", [f"{program}.py"])

    main = importlib.import_module(f"nitro_e.cli.{program}").main
    try:
        code = main(arguments_of(line, folder))
    except SystemExit as error:
        code = error.code
    assert fault(code, capsys.readouterr().err, False, f"{program}.py", line) is None


@pytest.mark.slow
def test_hundreds_of_command_lines(folder):
    """In forks of one process per program, and every twentieth in an interpreter of its own."""
    make_models(folder)
    faults, count, fresh = [], 0, 0
    for program, wrong in wrong_lines().items():
        lines = [(line, True) for line in RIGHT.get(program, [])] + [(line, False) for line in wrong]
        server = subprocess.run(
            [sys.executable, str(ROOT / "tests/fuzz_server.py"), str(ROOT / program), str(folder)],
            input="".join(json.dumps(arguments_of(line, folder)) + "\n" for line, _ in lines),
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=folder,
        )
        ended = [json.loads(answer) for answer in server.stdout.splitlines()]
        assert len(ended) == len(lines), f"{program}: the server ended early"
        for index, ((line, right), (code, seconds, stderr)) in enumerate(zip(lines, ended)):
            found = fault(code, stderr, right, program, line)
            if found is None and index % 20 == 0:
                fresh += 1
                command = [sys.executable, str(ROOT / program), *arguments_of(line, folder)]
                again = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    env=environment(),
                    cwd=folder,
                    timeout=180,
                )
                found = fault(again.returncode, again.stderr, right, program, line)
            print(f"{program} {line[:100]!r}: {code} after {seconds} s")
            if found is not None:
                faults.append(f"{program} {line}: {found}")
        count += len(lines)
    print(f"{count} command lines, {fresh} of them in fresh interpreters too, {len(faults)} ended badly")
    assert not faults, "\n".join(faults)
    assert count > 500 and fresh >= 20
