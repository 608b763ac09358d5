from dataclasses import asdict, replace

from pipeline.run_config import RunConfig

CONFIG = RunConfig(
    model="m", weights_sha256="1", classifier="c", classifier_sha256="2", label="auto", noise_sigma_255=None,
    reference=None, output_format="same", quality=95, clean="copy", dtype="float32", tile="auto",
    min_confidence=None, second_look=True, max_pixels=1000,
)  # fmt: skip


def test_the_digest_follows_every_field() -> None:
    changed = {
        "model": "n", "weights_sha256": "9", "classifier": "d", "classifier_sha256": "9", "label": "rain",
        "noise_sigma_255": 25.0, "reference": "r", "output_format": "png", "quality": 90, "clean": "link",
        "dtype": "bfloat16", "tile": "off", "min_confidence": 0.5, "second_look": False, "max_pixels": 5,
        "algorithm_version": 0,
    }  # fmt: skip
    assert set(changed) == set(asdict(CONFIG))
    digests = {replace(CONFIG, **{name: value}).digest for name, value in changed.items()}
    assert len(digests | {CONFIG.digest}) == len(changed) + 1


def test_differences_name_the_field_and_both_values() -> None:
    stored = asdict(replace(CONFIG, quality=90))
    assert CONFIG.differences(stored) == ["quality: was 90, is now 95"]
    assert CONFIG.differences(asdict(CONFIG)) == []
