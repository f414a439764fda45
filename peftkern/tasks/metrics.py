"""Entity metrics by seqeval, classification metrics by scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from seqeval import metrics as entities
from sklearn import metrics as classes


def entity_metrics(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro precision, recall and F1 over whole entities (type and both ends right), and accuracy over words.

    `gold` and `predicted` hold one tag per word of each sentence. As in the CoNLL script, an `I-` tag without its
    `B-` opens an entity. Without any entity to find or found a value is 0.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns of 0/0 and of each tag not yet seen in the prediction
        return {
            "precision": float(entities.precision_score(gold, predicted, zero_division=0)),
            "recall": float(entities.recall_score(gold, predicted, zero_division=0)),
            "f1": float(entities.f1_score(gold, predicted, zero_division=0)),
            "accuracy": float(entities.accuracy_score(gold, predicted)),
        }


def entity_report(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> str:
    """Seqeval's table of precision, recall, F1 and support per entity type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return str(entities.classification_report(gold, predicted, digits=3, zero_division=0))


def class_metrics(gold: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 averaged over the classes: plain (macro) and by support (weighted)."""
    values = {"accuracy": float(classes.accuracy_score(gold, predicted))}
    for average, suffix in (("macro", ""), ("weighted", "_weighted")):
        precision, recall, f1, _ = classes.precision_recall_fscore_support(
            gold, predicted, average=average, zero_division=0
        )
        values |= {
            f"precision{suffix}": float(precision),
            f"recall{suffix}": float(recall),
            f"f1{suffix}": float(f1),
        }
    return values


def class_report(gold: Sequence[str], predicted: Sequence[str]) -> str:
    """scikit-learn's table of precision, recall, F1 and support per class."""
    return str(classes.classification_report(gold, predicted, digits=3, zero_division=0))
