import math
import random

import numpy as np
import pytest

from encoders.sampling import FrameSampling


def test_a_fixed_number_of_frames():
    sampling = FrameSampling(num_frames=4)
    assert [sampling.count(seconds) for seconds in (0.0, 0.1, 8.0, 9000.0)] == [4] * 4
    assert sampling.times(0.0, 8.0) == [1.0, 3.0, 5.0, 7.0]
    assert sampling.times(2.0, 4.0) == [2.25, 2.75, 3.25, 3.75]
    assert sampling.times(3.0, 3.0) == [3.0] * 4


def test_a_rate_with_a_floor_and_a_cap():
    sampling = FrameSampling(fps=2.0, min_frames=2, max_frames=10)
    assert [sampling.count(seconds) for seconds in (0.0, 0.9, 1.3, 1.75, 3.24, 3.26, 5.0, 60.0)] == [2, 2, 3, 4, 6, 7, 10, 10]
    np.testing.assert_allclose(np.diff(sampling.times(0.0, 4.0)), 0.5)
    np.testing.assert_allclose(sampling.times(0.0, 60.0), np.arange(3, 60, 6))


def test_random_times_lie_each_in_its_segment_and_cover_it():
    sampling = FrameSampling(num_frames=5)
    generator = random.Random(3)
    draws = np.array([sampling.times(1.0, 11.0, generator) for _ in range(400)])
    places = (draws - 1.0) / 2.0 - np.arange(5)
    assert 0 <= places.min() < 0.02 and 0.98 < places.max() <= 1
    np.testing.assert_allclose(places.mean(0), 0.5, atol=0.06)
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.2
    assert sampling.times(1.0, 11.0, random.Random(3)) == draws[0].tolist()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_frames": 0}, "sampling.num_frames must be at least 1, got 0"),
        ({"fps": 0.0}, "sampling.fps is a number of frames a second, above 0, or null, got 0"),
        ({"fps": math.inf}, "sampling.fps is .* got inf"),
        ({"min_frames": 5, "max_frames": 4}, "sampling.min_frames must be at least 1 and at most max_frames, got 5 and 4"),
        ({"min_frames": 0}, "sampling.min_frames must be at least 1"),
    ],
)
def test_options_are_checked(options, reason):
    with pytest.raises(ValueError, match=reason):
        FrameSampling(**options)
