"""Plots of the doctor's page."""

import re

from inspection.plots import HEIGHT, WIDTH, bars


def test_all_that_is_drawn_lies_in_the_plot() -> None:
    labels = [(10.0 * power, f"1e{power}") for power in range(6)]
    plot = bars([[3, 1], [0, 2], [4, 0]], ["red", "blue"], 21, 4, [(20, "least"), (38, "most")], labels)
    assert re.findall(r">(1e\d)<", plot) == ["1e2", "1e3"]  # from 20, the first mark, to 38
    assert re.findall(r">(\w+)</text>", plot)[2:] == ["least", "most"]
    found = re.findall(r'rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', plot)
    rectangles = [tuple(map(float, numbers)) for numbers in found]
    assert len(rectangles) == 4
    assert all(x >= 0 and y >= 0 and x + width <= WIDTH and y + height <= HEIGHT for x, y, width, height in rectangles)
    assert all(0 <= float(x) <= WIDTH for x in re.findall(r'<text x="(.*?)"', plot))
