"""Generated NER data: English sentences with persons (PER), organisations (ORG) and places (LOC), in the CoNLL format.

Names are composed of syllables and dealt out to the three sets, so that no name, and no word made up for one, occurs in
two of them. All kinds draw on the same made-up words: whether "Talvona" is a person, a company or a town is told by
its neighbours only ("Talvona Bank", "the streets of Talvona"), and in some sentences hardly at all. Made-up words that
are no entity (brands, gadgets), capitalised common words, titles and lower-cased sentences are mixed in.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from peftkern.tasks.conll import write_conll
from peftkern.tasks.records import Sentence

SIZES = {"train": 480, "dev": 96, "test": 240}

_STARTS = """
al an bar bel bren cal cor dal del dor el fal fen gar gol hal har il jor kal kar kel lan lor mal mar mel nal nor or pel
quin ral ren sal sel sor tal tar ter ul val var vel wes yar zan zel
""".split()
_MIDDLES = ["", "a", "e", "i", "o", "an", "en", "ar", "or", "ist", "ov", "am"]
_ENDS = "da den dor dra gan gen ka kin la len lin ma man mir na nik ra ran ris sa sen ta tor va vin vo wyn za".split()

_PERSON = ["{w} {w}", "{w} {w}", "{w}", "{i} {w}", "{w} {i} {w}", "{w} van {w}"]
_TITLES = ["Mr", "Ms", "Dr", "Professor", "President", "Minister", "Judge", "Captain"]
_PLACE = ["{w}", "{w}", "{w}", "Port {w}", "New {w}", "Lake {w}", "{w} Valley", "{w} Island", "North {w}"]
_ORGANISATION = [
    "{w}", "{w}", "{w} Group", "{w} Bank", "{w} & {w}", "{w} Airlines", "University of {w}", "{w} United",
    "{w} Institute", "{w} City Council", "{w} Motors", "Ministry of {w} Affairs", "{w} and Sons", "The {w} Times",
    "{w} Foundation",
]  # fmt: skip

_PATTERNS = """
{person} was born in {place} .
{person} moved from {place} to {place} last {month} .
{title} {person} told reporters in {place} that talks would go on .
{person} , who grew up near {place} , now works for {organisation} .
{organisation} has named {person} as its new chief executive .
{organisation} will close its office in {place} by {month} .
Shares of {organisation} fell {number} percent on {day} .
{organisation} said on {day} it would buy {organisation} for {number} million dollars .
{number} people were hurt when a bus left the road near {place} .
Heavy rain is expected in {place} and in {place} on {day} .
The mayor of {place} , {person} , opened the bridge .
{person} and {person} met at a conference in {place} .
Police in {place} arrested {person} on {day} .
The court ordered {organisation} to pay {number} million dollars .
She studied at {organisation} before she joined {organisation} .
He flew to {place} with {organisation} .
{person} scored twice as {organisation} beat {organisation} in {place} .
Workers at {organisation} went on strike on {day} .
The road between {place} and {place} is closed until {month} .
{person} wrote the song after a summer in {place} .
In {month} , {organisation} hired {number} engineers in {place} .
The {gadget} sold by {organisation} costs {number} dollars .
Critics liked the {gadget} , but few people bought it .
My old {gadget} broke on {day} .
On {day} , nobody in {place} had water .
Tourists love the beaches of {place} .
A spokesman for {organisation} , {person} , gave no reason .
According to {person} , the plan came from {organisation} .
{person} lives with three cats in {place} .
{person} 's brother works as a nurse .
{organisation} 's annual report is out .
{place} 's harbour froze in {month} .
Nothing new , says {person} .
Letters to {person} were found in an attic in {place} .
The train to {place} leaves at {number} .
{organisation} v {organisation} will be heard in {month} .
We walked from {place} to the sea .
{title} {person} resigned on {day} .
Both {person} and {organisation} denied it .
The {gadget} , a phone with two screens , was shown in {place} .
Flights from {place} to {place} were cancelled .
{person} left {organisation} in {month} after {number} years .
{organisation} and {organisation} agreed to merge .
{person} won the race ahead of {person} and {person} .
Prices rose {number} percent in {place} .
{either} declined to comment .
{either} won the award again .
{either} is under pressure .
Everyone talks about {either} .
{either} has lost {number} million dollars since {month} .
Nobody trusts {either} any more .
{anything} looks different now .
This is a story about {anything} .
I have never heard of {anything} .
Summer in {place} is short , but {person} stays .
The weather on {day} was fine .
Most readers agree with {organisation} .
Thousands marched through {place} against {organisation} .
{person} ( {place} ) was third .
Contact : {person} , {organisation} , {place} .
""".strip().splitlines()

_WORDS = {
    "month": "January February March April May June July August September October November December".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "title": _TITLES,
}


def generate(folder: Path, seed: int = 7, sizes: dict[str, int] | None = None) -> Path:
    """Write train.conll, dev.conll and test.conll into `folder` and return it; the same seed writes the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, sentences in make_sets(seed, sizes).items():
        write_conll(folder / f"{split}.conll", sentences)
    return folder


def make_sets(seed: int = 7, sizes: dict[str, int] | None = None) -> dict[str, list[Sentence]]:
    """The three sets, each with made-up words of its own. ValueError for more sentences than there are words."""
    sizes = sizes or SIZES
    generator = random.Random(seed)
    words = sorted({start + middle + end for start in _STARTS for middle in _MIDDLES for end in _ENDS})
    if sum(sizes.values()) > len(words):
        raise ValueError(f"sizes={sizes}: there are made-up words for {len(words)} sentences in all")
    generator.shuffle(words)
    # Two per sentence: few enough that one word is met as a person here and as a town there.
    share = {split: min(2, len(words) // sum(sizes.values())) * count for split, count in sizes.items()}
    sets, start = {}, 0
    for split, count in sizes.items():
        pool = words[start : start + share[split]]
        start += share[split]
        sets[split] = [_sentence(generator, pool) for _ in range(count)]
    return sets


def _sentence(generator: random.Random, pool: list[str]) -> Sentence:
    words: list[str] = []
    tags: list[str] = []
    for part in generator.choice(_PATTERNS).split():
        for word, tag in _fill(generator, part, pool):
            words.append(word)
            tags.append(tag)
    case = generator.random()
    if case < 0.15:
        words = [word.lower() for word in words]
    elif case < 0.2:
        words = [word.upper() for word in words]
    return Sentence(tuple(words), tuple(tags))


def _fill(generator: random.Random, part: str, pool: list[str]) -> Iterator[tuple[str, str]]:
    """The words of one slot (or the word itself) with their tags."""
    if not re.fullmatch(r"\{\w+\}", part):
        yield part, "O"
        return
    slot = part[1:-1]
    if slot == "either":
        slot = generator.choice(["person", "organisation"])
    elif slot == "anything":
        slot = generator.choice(["person", "organisation", "place", "gadget"])
    if slot in _WORDS:
        yield generator.choice(_WORDS[slot]), "O"
    elif slot == "number":
        yield str(generator.randint(2, 95)), "O"
    elif slot == "gadget":
        yield generator.choice(pool).capitalize(), "O"
        yield generator.choice(["phone", "lamp", "tablet", "bicycle", "X", "2"]), "O"
    else:
        shapes = {"person": _PERSON, "place": _PLACE, "organisation": _ORGANISATION}[slot]
        shape = generator.choice(shapes).split()
        kind = {"person": "PER", "place": "LOC", "organisation": "ORG"}[slot]
        for place, piece in enumerate(shape):
            made = piece.replace("{w}", generator.choice(pool).capitalize())
            made = made.replace("{i}", generator.choice("ABCDEFGHJKLMNPRSTW") + ".")
            yield made, f"{'I' if place else 'B'}-{kind}"
