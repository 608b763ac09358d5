"""What is wrong with each image of a batch, and what is to be done about it."""

import time
from collections.abc import Collection, Sequence

from classifier.base import Classifier
from classifier.labels import Degradation
from classifier.sigma import estimate_sigma
from classifier.view import Views
from models.memory import is_out_of_memory
from pipeline.batching import in_halves
from pipeline.item import Item
from pipeline.metrics import is_flat
from pipeline.prompting import Decision, decide, decide_forced
from pipeline.records import Stage
from pipeline.run_config import RunConfig


class Judge:
    """Fills in label, decision and prompt: by a classifier, or by the run's forced label."""

    def __init__(self, config: RunConfig, *, classifier: Classifier | None, prompts: Collection[str]) -> None:
        """`classifier` may be None when the label is forced; `prompts` are the keys of the model's prompts."""
        if config.label == "auto" and classifier is None:
            raise ValueError("label auto needs a classifier")
        self._config, self._prompts = config, prompts
        self._classifier = classifier if config.label == "auto" else None

    @property
    def classifier_name(self) -> str | None:
        """Name of the classifier that decides; None where the label is forced."""
        return self._classifier.name if self._classifier is not None else None

    def look(self, item: Item) -> None:
        """Takes from a decoded item what `decide` needs; in any thread."""
        with item.stage(Stage.CLASSIFY):
            if self._classifier is not None:
                item.looked_at = self._classifier.take_views(item.seen())
                item.is_flat = is_flat(item.decoded().visible)
            if self._classifier is not None or self._config.label == Degradation.NOISE:
                # It depends on the picture alone, so it is noted even where a given sigma overrules it.
                item.facts["noise_sigma_255"] = estimate_sigma(item.seen())

    def decide(self, items: Sequence[Item]) -> None:
        """Gives items that have been looked at their decisions; one that cannot be classified fails alone."""
        if not items:
            return
        in_halves(items, self._decide, on_fault=lambda item, error: item.fail(Stage.CLASSIFY, error))
        for item in items:
            item.looked_at = None

    def _decide(self, items: Sequence[Item]) -> None:
        started = time.perf_counter()
        if self._classifier is None:
            for item in items:
                self._decide_forced(item)
        else:
            found = self._classifier.probabilities([_views(item) for item in items])
            for item, probability in zip(items, found, strict=True):
                prediction = self._classifier.prediction(probability, noise_sigma_255=item.facts["noise_sigma_255"])
                item.facts.update(
                    confidence=prediction.confidence,
                    margin=prediction.margin,
                    probabilities={str(label): p for label, p in prediction.probabilities.items()},
                    clean_probability_before=prediction.probabilities[Degradation.CLEAN],
                )
                least = self._config.min_confidence
                decision = decide(prediction, prompts=self._prompts, min_confidence=least, is_flat=item.is_flat)
                _note(item, decision)
        _add_ms(items, Stage.CLASSIFY, started)

    def look_again(self, item: Item) -> None:
        """Takes from a restored item what `note_cleanness` needs, if the run asks for it; in any thread."""
        if self._classifier is not None and self._config.second_look and item.restored is not None:
            started = time.perf_counter()
            try:
                item.looked_at = self._classifier.take_views(item.result_seen())
            except Exception as error:
                _note_unseen(item, error)
            _add_ms([item], Stage.MEASURE, started)

    def note_cleanness(self, items: Sequence[Item]) -> None:
        """Notes how clean the results look to the classifier, of items that have been looked at again."""
        classifier = self._classifier
        seen = [item for item in items if item.looked_at is not None and not item.has_failed]
        if classifier is None or not seen:
            return

        def work(batch: Sequence[Item]) -> None:
            started = time.perf_counter()
            found = classifier.probabilities([_views(item) for item in batch])
            for item, probability in zip(batch, found, strict=True):
                item.facts["clean_probability_after"] = probability[Degradation.CLEAN]
            _add_ms(batch, Stage.MEASURE, started)

        in_halves(seen, work, on_fault=_note_unseen)

    def _decide_forced(self, item: Item) -> None:
        label, given = self._config.label, self._config.noise_sigma_255
        estimated = item.facts.get("noise_sigma_255", 0.0)
        _note(item, decide_forced(label, sigma_255=given, estimated_sigma_255=estimated, prompts=self._prompts))


def _views(item: Item) -> Views:
    assert item.looked_at is not None
    return item.looked_at


def _note(item: Item, decision: Decision) -> None:
    item.status = decision.status
    item.facts.update(label=str(decision.label), decision_reason=decision.reason, prompt=decision.prompt)


def _note_unseen(item: Item, error: Exception) -> None:
    """The result is none the worse for it."""
    item.warnings.append(f"not looked at again: {'memory was full' if is_out_of_memory(error) else error}")


def _add_ms(items: Sequence[Item], stage: Stage, started: float) -> None:
    """Divides the time since `started` among items."""
    for item in items:
        item.add_ms(stage, (time.perf_counter() - started) * 1000 / len(items))
