"""Align the projector of the built-in backbone: image tokens -> word embeddings, on captioned images.

    python scripts/train_projector.py --sources FOLDER [--steps 240]

Only the projector (1728 -> 576 -> 576) learns; image encoder and language model are frozen. The images are Noto emoji
with their names and the training sides of easy-VQA, Fashion-MNIST and MNIST with generated captions. No image of a
probe or test split of the built-in stream is among them (checked by pixels). Writes the projector and the mean and
standard deviation of the raw image tokens, in half precision, to driftlens/backbones/data/projector.safetensors.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import time
from pathlib import Path

import numpy as np
import torch
from builtin_sources import GARMENTS, EmojiSheet, easy_vqa, fashion, fetch_sources, mnist, png_bytes
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from driftlens.backbones.assets import fetch_assets
from driftlens.backbones.conversion import quiet_transformers
from driftlens.backbones.encoding import Encoder, collate, image_to_pixels
from driftlens.backbones.vision import register_tower
from driftlens.streams import Sample, load_stream
from driftlens.streams.builtin import BUILTIN_TASKS

OUT = Path(__file__).resolve().parents[1] / "driftlens" / "backbones" / "data" / "projector.safetensors"
SEED = 20241
BATCH = 16
HELD_OUT = 128
PROMPT = "What is this?"
# Share of each source in a batch: emoji are the most varied, the others need fewer looks.
SHARES = {"emoji": 7, "easy_vqa": 3, "fashion": 3, "mnist": 3}


def pixel_hash(image: Image.Image) -> bytes:
    """Hash of the decoded pixels, the same for any encoding of one image."""
    return hashlib.sha256(image.convert("RGB").tobytes()).digest()


def forbidden() -> set[bytes]:
    """Return the pixel hashes of all probe and test images of the built-in stream."""
    stream = load_stream("builtin", tasks=list(BUILTIN_TASKS))
    held = [sample for task in stream for sample in (*task.probe, *task.test) if sample.image is not None]
    return {pixel_hash(Image.open(io.BytesIO(sample.image or b""))) for sample in held}


def captioned(roots: dict[str, Path], rng: np.random.Generator) -> dict[str, list[tuple[Image.Image, str]]]:
    """Return (image, caption) lists by source, without any forbidden image."""
    sheet = EmojiSheet(roots["emoji"])
    flags_and_icons = [(sheet.glyph(e), str(e["name"]).replace(" Flag", " flag").lower()) for e in sheet.entries]
    rows, folder = easy_vqa(roots["easy_vqa"], "train")
    colour: dict[int, str] = {}
    shape: dict[int, str] = {}
    for _, answer, number in rows:
        if answer in ("circle", "rectangle", "triangle"):
            shape[number] = answer
        elif answer not in ("yes", "no"):
            colour[number] = answer
    known = sorted(colour.keys() & shape.keys())
    shapes = [
        (Image.open(folder / f"{known[i]}.png").convert("RGB"), f"a {colour[known[i]]} {shape[known[i]]}")
        for i in rng.permutation(len(known))[:600]
    ]
    made = {"emoji": flags_and_icons, "easy_vqa": shapes}
    images, labels = fashion(roots["fashion"], "train")
    made["fashion"] = [(Image.fromarray(images[i]), f"a {GARMENTS[labels[i]]}") for i in rng.permutation(60_000)[:600]]
    images, labels = mnist(roots["mnist"])
    made["mnist"] = [(Image.fromarray(images[i]), f"the digit {labels[i]}") for i in rng.permutation(len(images))[:700]]
    banned = forbidden() | quantised_forms(roots, forbidden())
    return {name: [row for row in pairs if pixel_hash(row[0]) not in banned] for name, pairs in made.items()}


def quantised_forms(roots: dict[str, Path], banned: set[bytes]) -> set[bytes]:
    """Return the hashes of full-colour emoji whose palette forms, which the stream stores, are banned."""
    sheet = EmojiSheet(roots["emoji"])
    found = set()
    for entry in sheet.entries:
        glyph = sheet.glyph(entry)
        for colours in (64, 128):
            stored = Image.open(io.BytesIO(png_bytes(glyph.quantize(colours).convert("RGB"))))
            if pixel_hash(stored) in banned:
                found.add(pixel_hash(glyph))
    return found


class Aligner:
    """The frozen model around the projector, with all image tokens computed once."""

    def __init__(self, model: LlavaForConditionalGeneration, encoder: Encoder, pairs: list[tuple[Image.Image, str]]):
        self.model = model
        self.projector = model.model.multi_modal_projector
        size = model.model.vision_tower.config.image_size
        with torch.no_grad():
            blocks = [
                model.model.vision_tower.raw_tokens(
                    torch.from_numpy(np.stack([image_to_pixels(image, size) for image, _ in pairs[i : i + 32]]))
                )
                for i in range(0, len(pairs), 32)
            ]
        raw = torch.cat(blocks)
        self.mean, self.std = raw.mean((0, 1)), raw.std((0, 1)).clamp_min(1e-4)
        self.tokens = (raw - self.mean) / self.std
        self.encoded = []
        for number, (image, caption) in enumerate(pairs):
            self.encoded.append(encoder.encode(Sample(str(number), "caption", PROMPT, caption, png_bytes(image))))
        self.pad = encoder.pad_token_id
        # The frozen language model needs no more than bfloat16, which halves a step; the projector learns in float32.
        model.model.language_model.to(torch.bfloat16)
        model.lm_head.to(torch.bfloat16)

    def loss(self, indices: list[int]) -> Tensor:
        """Return the caption's mean negative log-likelihood in nats per token."""
        batch = collate([self.encoded[i] for i in indices], padding_side="right", pad_token_id=self.pad)
        embeds = self.model.get_input_embeddings()(batch["input_ids"])
        images = self.projector(self.tokens[indices])
        embeds = embeds.masked_scatter((batch["roles"] == 0)[..., None], images.to(embeds.dtype))
        names = ("attention_mask", "position_ids", "labels")
        loss: Tensor = self.model(inputs_embeds=embeds, **{name: batch[name] for name in names}).loss
        return loss


def main() -> None:
    """Train once and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder for the archives")
    parser.add_argument("--cache", type=Path, default=None, help="cache of the backbone's weights")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)
    rng = np.random.default_rng(SEED)
    sources = captioned(fetch_sources(args.sources, tuple(SHARES)), rng)
    pairs, pools = [], {}
    for name, rows in sources.items():
        pools[name] = list(range(len(pairs), len(pairs) + len(rows)))
        pairs += rows
    print({name: len(pool) for name, pool in pools.items()})

    register_tower()
    folder = fetch_assets(args.cache).folder
    with quiet_transformers():
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.xavier_uniform_(layer.weight)
        layer.requires_grad_(True)
    # Image tokens should start at the size of word embeddings, or the language model sees noise of another scale.
    with torch.no_grad():
        projector.linear_2.weight.mul_(float(model.get_input_embeddings().weight.std()))
    size = model.model.vision_tower.config.image_size
    encoder = Encoder(tokenizer, model.config.image_token_id, 4, lambda image: image_to_pixels(image, size))
    started = time.perf_counter()
    aligner = Aligner(model, encoder, pairs)
    print(f"image tokens: {time.perf_counter() - started:.0f} s")

    held = [int(i) for i in rng.permutation(len(pairs))[:HELD_OUT]]
    train = {name: [i for i in pool if i not in set(held)] for name, pool in pools.items()}

    def held_out_loss() -> float:
        with torch.no_grad():
            return float(torch.stack([aligner.loss(held[i : i + 32]) for i in range(0, HELD_OUT, 32)]).mean())

    before = held_out_loss()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps, pct_start=0.1)
    started = time.perf_counter()
    for step in range(args.steps):
        chosen = [int(i) for name, share in SHARES.items() for i in rng.choice(train[name], share, replace=False)]
        loss = aligner.loss(chosen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step:4d} loss {loss.item():.3f} {time.perf_counter() - started:.0f} s", flush=True)
    print(f"held-out loss: {before:.3f} before, {held_out_loss():.3f} after")
    tensors = {**projector.state_dict(), "token_mean": aligner.mean, "token_std": aligner.std}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().half().contiguous() for name, value in tensors.items()}, args.out)
    print(f"{args.out.name}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
