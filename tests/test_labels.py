from classifier.labels import CLEAN_LIMITS, LABELS, Degradation


def test_labels_are_the_closed_set_in_the_order_of_the_outputs():
    assert [str(label) for label in LABELS] == ["noise", "rain", "haze", "blur", "lowlight", "clean", "other"]
    assert Degradation("haze") is Degradation.HAZE


def test_clean_limits_leave_room_on_both_sides():
    assert 0 < CLEAN_LIMITS.noise_sigma_255 < 15
    assert CLEAN_LIMITS.blur_px > 0
    assert 0 < CLEAN_LIMITS.exposure < 1
    assert 0 < CLEAN_LIMITS.transmission < 1
    assert 0 < CLEAN_LIMITS.scale < 1
    assert 25 < CLEAN_LIMITS.jpeg_quality < 100
