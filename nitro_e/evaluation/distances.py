"""Distances between generated images and real ones, as values of single images.

    fid         Fréchet distance of Inception-v3's pooled features        Heusel et al. 2017, arXiv:1706.08500
    fd-dinov2   Fréchet distance of the class token of DINOv2 ViT-L/14    Stein et al. 2023, arXiv:2306.04675
    cmmd        squared MMD of CLIP ViT-L/14@336 embeddings, times 1000   Jayasumana et al. 2024, arXiv:2401.09603

A distance belongs to a set of images. `frechet` and `mmd` give every generated image a value all the same: the distance
plus the image's influence on it (Hampel 1974). The values' mean is the distance and their spread gives its standard
error (the infinitesimal jackknife, Efron and Stein 1981), so intervals and paired differences are those of all other
scores. What no interval shows is the bias of a Fréchet distance: it falls with the number of images, so compare equal
numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from nitro_e import files
from nitro_e.config import ConfigError
from nitro_e.evaluation.reference import Reference, read_images
from nitro_e.record import progress

CHUNK = 512  # images whose features are kept in one file
DINOV2_LARGE = "timm/vit_large_patch14_dinov2.lvd142m"
CLIP_336 = "openai/clip-vit-large-patch14-336"
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


class Extractor(nn.Module):
    """A network, and what it makes of images (B, 3, H, W) uint8 on any device: features (B, D)."""

    def __init__(
        self, network: nn.Module, features: Callable[[nn.Module, Tensor], Tensor], device: str
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False).to(device)
        self.features, self.device = features, device

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.network, images.to(self.device))


@dataclass(frozen=True)
class Distance:
    """A distance: how its features are made, and how two sets of them give a value per generated image."""

    load: Callable[[str | None, str], Extractor]  # (path of the weights or null, device)
    values: Callable[[np.ndarray, np.ndarray], np.ndarray]  # generated (N, D), real (M, D) -> (N,)


def frechet(generated: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Return (N,) values whose mean is |m_g - m_r|^2 + tr(S_g + S_r - 2 (S_g S_r)^(1/2)); N and M of 2 or more.

    Influence of x: 2 (m_g - m_r).(x - m_g) + (x - m_g)^T (1 - A) (x - m_g) less its mean, where
    A = R (R S_g R)^(-1/2) R with R = S_r^(1/2) is the optimal transport map from one Gaussian to the other.
    """
    (mean, covariance), (real_mean, real_covariance) = map(_moments, (generated, real))
    root = _power(real_covariance, 0.5)
    inner = root @ covariance @ root
    difference, centered = mean - real_mean, generated - mean
    trace = np.trace(covariance) + np.trace(real_covariance) - 2 * np.trace(_power(inner, 0.5))
    transport = root @ _power(inner, -0.5) @ root
    curvature = (centered * (centered - centered @ transport)).sum(1)  # (N,)
    influence = 2 * centered @ difference + curvature * len(generated) / (len(generated) - 1)
    return difference @ difference + trace + influence - influence.mean()


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Raise a symmetric matrix without negative eigenvalues to a power; zero eigenvalues stay zero."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    positive = values > values.max(initial=0) * len(values) * np.finfo(np.float64).eps
    powers = np.where(positive, np.where(positive, values, 1) ** exponent, 0)
    return (vectors * powers) @ vectors.T


def mmd(
    generated: np.ndarray, real: np.ndarray, *, bandwidth: float = 10.0, scale: float = 1000.0
) -> np.ndarray:
    """Return (N,) values whose mean is scale * (mean k_gg + mean k_rr - 2 mean k_gr), a Gaussian kernel's squared MMD.

    Means run over all pairs, an image with itself included, as in the authors' code.
    """
    kernel = partial(_mean_kernel, bandwidth=bandwidth)
    within, across = kernel(generated, generated), kernel(generated, real)  # (N,), (N,)
    real_within = kernel(real, real).mean()
    distance = within.mean() + real_within - 2 * across.mean()
    influence = 2 * (within - within.mean()) - 2 * (across - across.mean())
    return scale * (distance + influence)


def _mean_kernel(rows: np.ndarray, columns: np.ndarray, bandwidth: float) -> np.ndarray:
    """Average exp(-|x - y|^2 / (2 bandwidth^2)) over the columns, for every row; 1,000 rows at a time."""
    columns = torch.from_numpy(columns).double()
    parts = [
        (torch.cdist(part, columns).square() / (-2 * bandwidth**2)).exp().mean(1)
        for part in torch.from_numpy(rows).double().split(1000)
    ]
    return torch.cat(parts).numpy()


# ---- features


def load_inception(path: str | None, device: str) -> Extractor:
    """Load torch-fidelity's Inception-v3, the network of the original FID, from its released file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if path is None or not Path(path).is_file():
        raise ConfigError(
            f"--reward-path: fid needs torch-fidelity's {INCEPTION} (github.com/toshas/torch-fidelity, release v0.2.0), "
            f"got {path or 'nothing'}; download it and name the file"
        )
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # the library itself would read any pickle
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--reward-path: '{path}' is no {INCEPTION} ({reason}); download it again"
        ) from error
    return Extractor(network, lambda network, images: network(images)[0], device)


def load_dinov2(path: str | None, device: str) -> Extractor:
    """Load DINOv2 from timm's files: the class token after the final norm, of images resized to 224 pixels."""
    from nitro_e.encoders import vision

    def load(folder: str) -> Any:
        return vision.load_vit(folder, torch.float32)

    vit = files.load(
        "fd-dinov2", "--reward-path", path or DINOV2_LARGE, load, ("model.safetensors", "config.json")
    )
    mean, std = (
        torch.tensor(values, device=device).reshape(1, 3, 1, 1)
        for values in (vision.IMAGENET_MEAN, vision.IMAGENET_STD)
    )

    def class_token(vit: Any, images: Tensor) -> Tensor:
        pixels = images.float() / 255
        pixels = F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True, align_corners=False)
        return vit.forward_features((pixels.clamp(0, 1) - mean) / std)[:, 0]

    return Extractor(vit, class_token, device)


def load_clip(path: str | None, device: str) -> Extractor:
    """Load a CLIP from transformers' files: unit vectors of images."""
    from nitro_e.encoders import clip

    def load(folder: str) -> clip.CLIP:
        return clip.load_clip(folder, torch.float32)

    wanted = (*files.TRANSFORMER, *files.TOKENIZER)
    network = files.load("cmmd", "--reward-path", path or CLIP_336, load, wanted)

    def embedding(network: Any, images: Tensor) -> Tensor:
        pixels = images.float() / 127.5 - 1
        return network.image_features(clip.fit_short_side(pixels, network.size))

    return Extractor(network, embedding, device)


DISTANCES = {
    "fid": Distance(load_inception, frechet),
    "fd-dinov2": Distance(load_dinov2, frechet),
    "cmmd": Distance(load_clip, mmd),
}


@torch.no_grad()
def features(
    extract: Extractor,
    identities: Sequence[Any],
    read: Callable[[int, int], Iterator[Tensor]],
    folder: Path,
    key: Any,
    title: str,
    renew: bool = False,
) -> np.ndarray:
    """Compute the features (N, D) float32 of N images, CHUNK by CHUNK, and keep them in files of `folder`.

    identities: plain data that tells N images apart; read(start, stop): their batches (B, 3, H, W) uint8; key: what
    else the features depend on; renew: compute anew what is there. A chunk is one file, which is there or not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with progress.bar(total=len(identities), desc=title, unit="img") as bar:
        for start in range(0, len(identities), CHUNK):
            these = identities[start : start + CHUNK]
            file = folder / f"features-{files.short_hash([key, list(these)])}.safetensors"
            if renew or not file.exists():
                rows = torch.cat([extract(batch).float().cpu() for batch in read(start, start + len(these))])
                with files.atomic_path(file) as temporary:
                    files.save_tensors({"features": rows}, temporary)
            found.append(load_file(file)["features"])
            bar.update(len(these))
    return torch.cat(found).numpy()


class DistanceScorer:
    """`scorer(folder, names, resolution)` gives drawn images their values of a distance to the images of a reference.

    Features are kept, those of drawn images beside them and those of real ones in `folder`, and not computed twice.
    """

    def __init__(
        self, name: str, reference: Reference, weights: str | None, device: str, folder: Path, rejudge: bool
    ) -> None:
        self.name, self.reference, self.folder, self.rejudge = name, reference, folder, rejudge
        self.distance = DISTANCES[name]
        self.extract = self.distance.load(weights, device)
        self.source = f"{weights or 'the default weights'} {files.weights_hash(self.extract)[:12]}"
        self._real: dict[int, np.ndarray] = {}  # resolution -> features (M, D)

    def __call__(self, folder: Path, names: Sequence[str], resolution: int) -> list[float]:
        """Return the value of every image; `names` are files of `folder`."""
        if len(names) < 2:
            raise ConfigError(f"--num: {self.name} needs 2 images or more, got {len(names)}")
        key = [self.source, resolution]
        if resolution not in self._real:
            read, title = partial(self.reference.images, resolution), f"{self.name}: real images"
            self._real[resolution] = features(
                self.extract, self.reference.identities(), read, self.folder, key, title, self.rejudge
            )
        drawn = features(
            self.extract,
            names,
            lambda start, stop: read_images([folder / name for name in names[start:stop]], resolution),
            folder,
            key,
            f"{self.name}: drawn images",
            self.rejudge,
        )
        return self.distance.values(drawn, self._real[resolution]).tolist()

    def sources(self) -> dict[str, str]:
        """Name what the distance is to, and by which weights."""
        return {self.name: f"{self.source}, to {len(self.reference)} images of {self.reference.source}"}
