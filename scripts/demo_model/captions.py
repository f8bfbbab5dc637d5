"""The grammar of the captions, the demo model's vocabulary and its tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

from scenes import BACKGROUNDS, COLOURS, FPS, MOTIONS, SHAPES, Combination, held_out_combinations
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

EVAL_PROMPTS = Path(__file__).with_name("eval_prompts.txt")

SHAPE_WORDS = {
    "circle": ("circle", "circle", "ball", "disc", "dot"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
}
COLOUR_WORDS = {
    "red": ("red", "red", "red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow", "yellow", "yellow", "golden"),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "purple", "purple", "violet"),
    "black": ("black",),
    "gray": ("gray", "grey"),
    "white": ("white",),
}
MOTION_WORDS = {
    "left": ("moving left", "moves left", "moves to the left", "moving to the left", "slides left", "going left"),
    "right": (
        "moving right",
        "moves right",
        "moves to the right",
        "moving to the right",
        "slides right",
        "going right",
    ),
    "up": ("moving up", "moves up", "rises", "rising", "moves upwards", "flies up", "going up"),
    "down": ("moving down", "moves down", "falls", "falling", "moves downwards", "sinks down", "going down"),
}
TEMPLATES = (
    "a {colour} {shape} {motion} on a {background} background",
    "a {colour} {shape} {motion} on a {background} background",
    "a {colour} {shape} {motion} over a {background} background",
    "a {colour} {shape} {motion} in front of a {background} background",
    "{colour} {shape} {motion}, {background} background",
    "a {colour} {shape} {motion} across a {background} background",
    "on a {background} background, a {colour} {shape} {motion}",
    "a video of a {colour} {shape} {motion} on a {background} background",
    "the {colour} {shape} {motion}, the background is {background}",
)
OTHER_WORDS = ("an", "with", "and", "it", "small", "big", "large", "single", "one", "backdrop", "slowly", "up", "down")
SPECIAL = ("<pad>", "</s>", "<unk>")


def caption(what: Combination, rng: random.Random) -> str:
    """One of the ways to say what a scene shows."""
    words = {
        "shape": rng.choice(SHAPE_WORDS[what.shape]),
        "colour": rng.choice(COLOUR_WORDS[what.colour]),
        "motion": rng.choice(MOTION_WORDS[what.motion]),
        "background": rng.choice(COLOUR_WORDS[what.background]),
    }
    text = rng.choice(TEMPLATES).format(**words)
    return text.replace("a orange", "an orange")


def training_caption(what: Combination, rng: random.Random, empty: float = 0.1, strange: float = 0.1) -> str:
    """A caption for training: sometimes empty (for guidance), sometimes with words that are not in the vocabulary."""
    if rng.random() < empty:
        return ""
    words = caption(what, rng).split()
    if rng.random() < strange:
        for _ in range(rng.randint(1, 2)):
            words.insert(rng.randint(0, len(words)), "<unk>")
    return " ".join(words)


def words() -> list[str]:
    """Every word that the tokenizer knows, sorted."""
    texts = [*TEMPLATES, *OTHER_WORDS]
    for synonyms in (SHAPE_WORDS, COLOUR_WORDS, MOTION_WORDS):
        texts += [text for group in synonyms.values() for text in group]
    split = " ".join(texts).replace(",", " , ").split()
    return sorted({word for word in split if not word.startswith("{")} | {",", "."})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cased words and punctuation; `</s>` ends every text, unknown words become `<unk>`."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words()))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def vocabulary() -> dict:
    """What can be drawn and how it may be called: names with their synonyms."""

    def unique(names: tuple[str, ...], synonyms: dict[str, tuple[str, ...]]) -> dict[str, list[str]]:
        return {name: list(dict.fromkeys(synonyms[name])) for name in names}

    return {
        "shapes": unique(SHAPES, SHAPE_WORDS),
        "colours": unique(COLOURS, COLOUR_WORDS),
        "motions": unique(MOTIONS, MOTION_WORDS),
        "backgrounds": unique(BACKGROUNDS, COLOUR_WORDS),
        "other_words": [*OTHER_WORDS],
        "examples": [
            "a red circle moving left on a blue background",
            "a yellow star rises over a black background",
            "purple box moves to the right, white background",
        ],
        "fps": FPS,
    }


def read_eval_prompts(path: Path = EVAL_PROMPTS) -> list[tuple[Combination, str]]:
    """The unseen combinations and their prompts, as committed."""
    rows = [line.split("\t") for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [(Combination(*row[:4]), row[4]) for row in rows]


def write_eval_prompts(path: Path = EVAL_PROMPTS) -> None:
    """Write one prompt for each held-out combination."""
    rng = random.Random(7)
    order = held_out_combinations()
    rng.shuffle(order)
    lines = ["# shape, colour, motion, background, prompt: combinations that training never sees"]
    lines += ["\t".join((w.shape, w.colour, w.motion, w.background, caption(w, rng))) for w in order]
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_eval_prompts()
    print(json.dumps(vocabulary(), indent=2))
