from classifier.labels import LABELS, Degradation


def test_labels_are_the_closed_set_in_the_order_of_the_outputs():
    assert [str(label) for label in LABELS] == ["noise", "rain", "haze", "blur", "lowlight", "clean", "other"]
    assert Degradation("haze") is Degradation.HAZE
