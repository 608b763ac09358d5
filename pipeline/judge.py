"""What is wrong with each image of a batch, and what is to be done about it."""

import time
from collections.abc import Collection, Sequence

from classifier.base import Classifier
from classifier.labels import Degradation
from classifier.sigma import estimate_sigma
from pipeline.batching import in_halves, is_out_of_memory
from pipeline.item import Item
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

    def decide(self, items: Sequence[Item], *, later_if_full: bool = False) -> None:
        """Gives each decoded item its decision; one that cannot be classified fails alone.

        With `later_if_full` an item for which there is no memory now stays undecided.
        """
        if not items:
            return

        def work(batch: Sequence[Item]) -> None:
            started = time.perf_counter()
            if self._classifier is None:
                for item in batch:
                    self._decide_forced(item)
            else:
                predictions = self._classifier.predict([item.seen() for item in batch])
                for item, prediction in zip(batch, predictions, strict=True):
                    item.facts.update(
                        confidence=prediction.confidence,
                        margin=prediction.margin,
                        probabilities={str(label): p for label, p in prediction.probabilities.items()},
                        noise_sigma_255=prediction.noise_sigma_255,
                        clean_probability_before=prediction.probabilities[Degradation.CLEAN],
                    )
                    decision = decide(prediction, prompts=self._prompts, min_confidence=self._config.min_confidence)
                    _note(item, decision)
            each_ms = (time.perf_counter() - started) * 1000 / len(batch)
            for item in batch:
                item.add_ms(Stage.CLASSIFY, each_ms)

        def fail(item: Item, error: Exception) -> None:
            if not (later_if_full and is_out_of_memory(error)):
                item.fail(Stage.CLASSIFY, error)

        in_halves(
            items,
            work,
            on_halved=lambda batch, error: None,
            on_fault=fail,
        )

    def look_again(self, items: Sequence[Item]) -> None:
        """Notes how clean the results look to the classifier, if the run asks for it."""
        if self._classifier is None or not self._config.second_look or not items:
            return
        classifier = self._classifier

        def work(batch: Sequence[Item]) -> None:
            started = time.perf_counter()
            found = [classifier.probabilities(item.result_seen())[Degradation.CLEAN] for item in batch]
            each_ms = (time.perf_counter() - started) * 1000 / len(batch)
            for item, probability in zip(batch, found, strict=True):
                item.facts["clean_probability_after"] = probability
                item.add_ms(Stage.MEASURE, each_ms)

        def fail(item: Item, error: Exception) -> None:
            if is_out_of_memory(error):  # of a GPU that is busy with other images; the result is none the worse
                item.warnings.append("not looked at again: memory was full")
            else:
                item.fail(Stage.MEASURE, error)

        in_halves(
            items,
            work,
            on_halved=lambda batch, error: None,
            on_fault=fail,
        )

    def _decide_forced(self, item: Item) -> None:
        label, given = self._config.label, self._config.noise_sigma_255
        estimated = 0.0
        if label == Degradation.NOISE:
            # The estimate depends on the picture alone, so it is noted even where a given sigma overrules it.
            estimated = estimate_sigma(item.seen())
            item.facts["noise_sigma_255"] = estimated
        _note(item, decide_forced(label, sigma_255=given, estimated_sigma_255=estimated, prompts=self._prompts))


def _note(item: Item, decision: Decision) -> None:
    item.status = decision.status
    item.facts.update(label=str(decision.label), decision_reason=decision.reason, prompt=decision.prompt)
