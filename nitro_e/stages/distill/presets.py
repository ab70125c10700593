"""The known methods as values of DistillConfig; docs/distill.md compares them. Other keys of a recipe override them."""

from __future__ import annotations

CHAIN = {"sigmas": (1.0, 0.75, 0.5, 0.25), "noise": "chain"}
ONE_STEP = {"sigmas": (1.0,), "noise": "chain"}
SLOW: dict = {"betas": (0.0, 0.99), "eps": 1e-8, "weight_decay": 0.0, "warmup": 500, "clip": 1.0}
GUIDED_FAKE = {"guidance_scale": "teacher", "optim": {"lr": 1e-6, **SLOW, "warmup": 0}}
LORA_FAKE = {"adapter": {"rank": 64, "targets": "blocks"}, "optim": {"lr": 1e-3, **SLOW, "warmup": 0}}
SHARED_GAN = {
    "loss": "non_saturating",
    "share_score": True,
    "start": 0,
    "ramp": 0,
    "discriminator": {"times": {"kind": "uniform"}},
    "misaligned": None,
    "r1": None,
    "optim": {"lr": 1e-5, **SLOW, "warmup": 0},
}
SPRINT_TIMES = {"share": 1.0, "times": {"kind": "logit_normal", "mean": 0.89, "std": 1.6}}
CONTINUOUS = {"sigmas": (1.0,), "continuous_times": SPRINT_TIMES, "noise": "fresh"}

PRESETS: dict[str, dict] = {
    # Nitro-E's four steps: LADD (arXiv 2403.12015), with its sigmas, on pairs and rollouts.
    "ladd4": {
        "inputs": {
            "sigmas": (1.0, 0.75, 0.5, 0.25),
            "probabilities": (
                (0, (0, 0, 0.5, 0.5)),
                (500, (0.1, 0.3, 0.3, 0.3)),
                (1500, (0.4, 0.2, 0.2, 0.2)),
            ),
            "noise": "pair",
            "rollout": {"share": 0.5, "start": 1000, "end": 3000},
        },
        "sampler": "euler",
        "diffusion": {
            "kind": "smooth_l1",
            "weight": 1.0,
            "decay": {"start": 5000, "end": 20000, "floor": 0.1},
        },
        "adversarial": {"loss": "hinge", "weight": "auto"},
    },
    # LADD's heads and sigmas, and the teacher's guided velocity at the student's input as target: the method that was
    # measured on `shapes` (docs/distill.md).
    "ladd_guided": {
        "inputs": {"sigmas": (1.0, 0.75, 0.5, 0.25), "noise": "fresh"},
        "sampler": "multistep",
        "diffusion": {"target": "teacher", "kind": "mse", "space": "velocity"},
        "adversarial": {
            "loss": "hinge",
            "weight": 0.3,
            "discriminator": {"times": {"kind": "logit_normal", "mean": -1.0, "std": 1.2}},
            "misaligned": None,
            "r1": {"sigma": 0.05, "weight": 20.0, "every": 4},
        },
        "guards": None,  # they compare with images; a guided velocity from pure noise points at something blurred
    },
    # Nitro-1: one step from the noise of the pair; t = 1 is pure noise, so zero terminal SNR is exact. The network is told
    # 0.4, as Nitro-1 tells PixArt 400 of 1000: there the teacher is sharper.
    "nitro1": {
        "inputs": {"sigmas": (1.0,), "noise": "pair"},
        "sampler": "euler",
        "time_scale": 0.4,
        "diffusion": {"kind": "smooth_l1", "weight": 1.0},
        "adversarial": {
            "loss": "non_saturating",
            "share_time": False,  # real and fake at times of their own, as in its code
            "weight": 1.0,
            "heads": {"condition": "none"},
            "discriminator": {"times": {"kind": "uniform"}, "least": 0.0, "most": 0.8},
            "misaligned": {"share": 0.5, "start": 0},
            "optim": {"lr": 1e-6, **SLOW, "warmup": 0},
        },
        "optim": {"lr": 1e-6, **SLOW},
    },
    # NitroFusion (arXiv 2412.02030): a changing pool of 480 heads; one to four steps from the same weights. It refines a
    # student of few steps (init_from). Heads are replaced by their use, and the weight is measured: at one percent of all
    # heads per step and a fixed weight they say too little (docs/distill.md).
    "nitrofusion": {
        "inputs": {"sigmas": (1.0,), "noise": "pair"},
        "sampler": "multistep",
        "time_scale": 0.5,
        "sample_steps": (1, 2, 3, 4),
        "diffusion": {"kind": "smooth_l1", "weight": 0.1},
        "adversarial": {
            "loss": "hinge",
            "weight": "auto",
            "pool": {
                "levels": (0.09, 0.41, 0.62, 0.80),
                "copies": 15,
                "use": 4,
                "refresh": 0.01,
                "refresh_unit": "use",
            },
            "misaligned": None,
            "null_text": 0.5,
        },
    },
    # The adversarial half of SANA-Sprint (arXiv 2503.09641) with the teacher's guided velocity in place of the consistency
    # half; see sana_sprint.
    "sana_adv": {
        "inputs": {**CONTINUOUS, "continuous_times": {**SPRINT_TIMES, "share": 0.5}},
        "sampler": "multistep",
        "sample_steps": (1, 2, 4),
        "diffusion": {"target": "teacher", "kind": "mse", "space": "velocity"},
        "adversarial": {
            "loss": "hinge",
            "weight": 0.5,
            "discriminator": {"times": {"kind": "logit_normal", "mean": 0.093, "std": 1.0}},
            "misaligned": {"share": 0.5, "start": 0},
            "optim": {"lr": 2e-6, **SLOW, "warmup": 0},
        },
        "guards": None,  # they compare with images; a guided velocity from pure noise points at something blurred
        "optim": {"lr": 2e-6, **SLOW},
    },
    # DMD2 (arXiv 2405.14867) for four steps, without its GAN: five updates of the fake score for one of the student.
    "dmd2": {
        "inputs": CHAIN,
        "sampler": "multistep",
        "every": 5,
        "score": {
            "times": {"range": "full"},
            "fake": {"optim": {"lr": 1e-5, **SLOW, "warmup": 0, "clip": 10.0}},
        },
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW, "clip": 10.0},
    },
    # TDM (arXiv 2503.06674): the same within the steps of a deterministic sampler, along its trajectory.
    "tdm": {
        "inputs": CHAIN,
        "sampler": "euler",
        "every": 5,
        "score": {
            "times": {"range": "step"},
            "noise": "trajectory",
            "fake": {"weighting": "snr", "optim": {"lr": 1e-5, **SLOW, "warmup": 0}},
        },
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW},
    },
    # DMD2 as published, with a GAN on images: data are images of the teacher or others.
    "dmd2_gan": {
        "inputs": CHAIN,
        "sampler": "multistep",
        "every": 5,
        "score": {"fake": {"optim": {"lr": 1e-5, **SLOW, "warmup": 0, "clip": 10.0}}},
        "adversarial": {**SHARED_GAN, "weight": 0.03},
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW, "clip": 10.0},
    },
    # f-distill (arXiv 2502.15681): the same, where the slope is weighted for the Jensen-Shannon divergence.
    "f_distill": {
        "inputs": CHAIN,
        "sampler": "multistep",
        "every": 10,
        "score": {"divergence": "js", "fake": {"optim": {"lr": 1e-5, **SLOW, "warmup": 0, "clip": 10.0}}},
        "adversarial": {**SHARED_GAN, "weight": 1e-3},
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW, "clip": 10.0},
    },
    # Decoupled DMD (arXiv 2511.22677): guidance at noise levels above the next step's, matching at all of them.
    "decoupled_dmd": {
        "inputs": CHAIN,
        "sampler": "multistep",
        "every": 5,
        "score": {"decoupled": True, "fake": {"optim": {"lr": 1e-5, **SLOW, "warmup": 0, "clip": 10.0}}},
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW, "clip": 10.0},
    },
    # Phased DMD (arXiv 2510.27684): noise is added to the next state of the sampler, and scores are of that noise.
    "phased_dmd": {
        "inputs": CHAIN,
        "sampler": "euler",
        "every": 5,
        "score": {
            "times": {"range": "above"},
            "noise": "trajectory",
            "fake": {"weighting": "transition", "optim": {"lr": 1e-5, **SLOW, "warmup": 0}},
        },
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW},
    },
    # SwiftBrush (arXiv 2312.05239): one step by variational score distillation; the fake score is a LoRA of rank 64.
    "swiftbrush": {
        "inputs": ONE_STEP,
        "sampler": "multistep",
        "score": {"form": "vsd", "fake": {"guidance_scale": "teacher", "drop_text": 0.1, **LORA_FAKE}},
        "guards": None,
        "optim": {"lr": 1e-6, **SLOW},
    },
    # PG-SB of SNOOPI (arXiv 2412.02687): the same with another guidance scale for every sample.
    "pg_sb": {
        "inputs": ONE_STEP,
        "sampler": "multistep",
        "score": {
            "form": "vsd",
            "guidance_scale": (2.0, 7.0),
            "fake": {"guidance_scale": "teacher", "drop_text": 0.1, **LORA_FAKE},
        },
        "guards": None,
        "optim": {"lr": 1e-6, **SLOW},
    },
    # SiD-LSG (arXiv 2406.01561): score identity distillation to one step, both networks guided by 2; the network is told
    # 0.625 at pure noise.
    "sid": {
        "inputs": ONE_STEP,
        "sampler": "multistep",
        "time_scale": 0.625,
        "score": {"form": "sid", "guidance_scale": 2.0, "fake": {**GUIDED_FAKE, "drop_text": 0.1}},
        "guards": None,
        "optim": {"lr": 1e-6, **SLOW},
    },
    # Few-step SiD (arXiv 2505.12674): the same on every step of the sampler, with one fake score for all.
    "sid_few": {
        "inputs": CHAIN,
        "sampler": "multistep",
        "score": {"form": "sid", "guidance_scale": 2.0, "fake": {**GUIDED_FAKE, "drop_text": 0.1}},
        "guards": None,
        "optim": {"lr": 1e-6, **SLOW},
    },
    # Score implicit matching (arXiv 2410.16794) to one step.
    "sim": {
        "inputs": ONE_STEP,
        "sampler": "multistep",
        "score": {"form": "sim", "fake": {"optim": {"lr": 1e-6, **SLOW, "warmup": 0}}},
        "guards": None,
        "optim": {"lr": 1e-6, **SLOW},
    },
    # DMDR (arXiv 2511.13649): DMD2 from a cold start, then with the policy gradient of rewards; a LoRA of rank 32. A recipe
    # names the rewards: stage.reward.rewards.
    "dmdr": {
        "inputs": {**CHAIN, "group": 4},
        "sampler": "multistep",
        "every": 5,
        "adapter": {"rank": 32, "targets": "blocks"},
        "score": {"fake": {"optim": {"lr": 2e-5, **SLOW, "warmup": 0}}},
        "reward": {"weight": 0.1, "start": 1000},
        "guards": None,
        "optim": {"lr": 2e-5, **SLOW},
    },
    # pi-Flow (arXiv 2510.14974): the teacher is asked along the path of the student's policy. It needs model.policy: 10.
    "pi_flow": {
        "inputs": CHAIN,
        "sampler": "policy",
        "imitate": {"largest_time": 1.0, "reach": 1.0, "places": 2},
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW},
    },
    # Ours: distribution matching, and the teacher's guided velocity on the student's own states (as in pi-Flow, arXiv
    # 2510.14974); no pairs, and one set of weights for 4, 2 and 1 steps.
    "score_imitate": {
        "inputs": {**CHAIN, "counts": {4: 0.4, 2: 0.3, 1: 0.3}},
        "sampler": "multistep",
        "start": 20,
        "score": {"weight": 1.0, "fake": {"optim": {"lr": 1.5e-5, **SLOW, "warmup": 0}}},
        "imitate": {"weight": 0.5, "largest_time": 0.8},
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW},
    },
    # Consistency distillation (arXiv 2303.01469) by short steps of the teacher: the control of the next ones. Times are
    # uniform: what is known at t = 0 reaches t = 1 by every time between, and SANA-Sprint's law has few near 0.
    "consistency": {
        "inputs": {**CONTINUOUS, "continuous_times": {"share": 1.0, "times": {"kind": "uniform"}}},
        "sampler": "multistep",
        "sample_steps": (1, 2, 4),
        "flow_map": {"kind": "discrete", "step": 1 / 48},
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW},
    },
    # sCM (arXiv 2410.11081), with SANA-Sprint's times and warm-up.
    "scm": {
        "inputs": CONTINUOUS,
        "sampler": "multistep",
        "sample_steps": (1, 2, 4),
        "flow_map": {"normalize": "tangent", "constant": 0.1, "warmup": 4000},
        "guards": None,
        "optim": {"lr": 2e-6, **SLOW},
    },
    # MeanFlow (arXiv 2505.13447) from a teacher: average velocities between any two times. It needs model.interval: true.
    "mean_flow": {
        "inputs": {
            "sigmas": (1.0,),
            "continuous_times": {"share": 1.0, "times": {"kind": "logit_normal", "mean": -0.4, "std": 1.0}},
            "noise": "fresh",
            "intervals": 0.5,
        },
        "sampler": "flow_map",
        "sample_steps": (1, 2, 4),
        "flow_map": {"normalize": "adaptive", "constant": 1e-2, "warmup": 2000},
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW},
    },
    # SANA-Sprint (arXiv 2503.09641): sCM, and heads that see half of the samples from pure noise.
    "sana_sprint": {
        "inputs": {**CONTINUOUS, "continuous_times": {**SPRINT_TIMES, "share": 0.5}},
        "sampler": "multistep",
        "sample_steps": (1, 2, 4),
        "flow_map": {"normalize": "tangent", "constant": 0.1, "warmup": 4000},
        "adversarial": {
            "loss": "hinge",
            "weight": 0.5,
            "discriminator": {"times": {"kind": "logit_normal", "mean": 0.093, "std": 1.0}},
            "misaligned": {"share": 0.5, "start": 0},
            "optim": {"lr": 2e-6, **SLOW, "warmup": 0},
        },
        "guards": None,
        "optim": {"lr": 2e-6, **SLOW},
    },
    # rCM (arXiv 2510.08431): sCM on images, and distribution matching on the student's own states, at scattered times.
    "rcm": {
        "inputs": {**CHAIN, "counts": {4: 0.5, 2: 0.25, 1: 0.25}, "scatter": True},
        "sampler": "multistep",
        "every": 5,
        "flow_map": {"normalize": "tangent", "constant": 0.1, "warmup": 1000, "times": SPRINT_TIMES["times"]},
        "score": {"fake": {"optim": {"lr": 1e-5, **SLOW, "warmup": 0}}},
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW},
    },
    # InstaFlow's second half (arXiv 2309.06380): regression to the pairs in one step, from a student of reflow (init_from).
    "instaflow": {
        "inputs": {"sigmas": (1.0,), "noise": "pair"},
        "sampler": "euler",
        "diffusion": {"kind": "smooth_l1", "weight": 1.0},
        "guards": None,
        "optim": {"lr": 1e-5, **SLOW},
    },
    # InstaFlow's first round (arXiv 2309.06380): straighter paths, any number of steps; a start for the others.
    "reflow": {
        "inputs": {"continuous_times": {"share": 1.0, "times": {"kind": "uniform"}}, "noise": "pair"},
        "sampler": "euler",
        "reflow": {"weight": 1.0},
        "guards": None,
    },
}
