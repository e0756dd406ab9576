"""A report as one HTML page, which needs nothing beside itself: pictures are data URIs, there is no script and no address."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from string import Template

import numpy as np

from inspection.doctor_text import length_facts, words_fact
from inspection.findings import TITLES, Finding, Kind
from inspection.lengths import KINDS, LengthSummary, histogram
from inspection.page_style import STYLE
from inspection.plots import bars, share_bar
from inspection.recommend import as_yaml
from inspection.records import Part
from inspection.report import Report
from inspection.thumbnails import Thumbnails

MOST_SHOWN = 24
"""Findings of a kind that are shown with a thumbnail; the JSON has all."""

MOST_ANSWERS = 12
COLOURS = {kind: f"var(--{kind}-tokens)" for kind in KINDS}


def make_page(report: Report, parts: Sequence[Part]) -> str:
    """The page of a report.

    Args:
        report: The report.
        parts: The files, from which thumbnails are made.
    """
    thumbnails = Thumbnails(parts)
    sections = [
        _summary(report),
        _recommended(report),
        *(_findings(report, kind, count, thumbnails) for kind, count in report.counts.items()),
        _lengths(report),
        _media(report),
        *_balances(report),
    ]
    return _PAGE.substitute(style=STYLE, sections="\n".join(filter(None, sections)))


def _summary(report: Report) -> str:
    passed = report.rows - report.rejected
    body = "".join(
        f"<tr><td>{escape(f'{part.source}/{part.split}' if part.source else part.split)}</td><td>{escape(part.file)}</td>"
        f"<td class=n>{part.rows:,}</td><td class=n>{part.passed:,}</td><td class=n>{part.rejected:,}</td>"
        f"<td>{share_bar(part.passed / part.rows if part.rows else 0, 'var(--good)')}</td></tr>"
        for part in report.parts
    )
    kinds = "".join(f'<a href="#{kind}">{escape(TITLES[kind])} <b>{count:,}</b></a>' for kind, count in report.counts.items())
    return (
        f'<p class="lead"><b>{passed:,}</b> of {report.rows:,} rows pass, <b>{report.rejected:,}</b> '
        f"{'is' if report.rejected == 1 else 'are'} rejected.</p><nav>{kinds}</nav>"
        "<table><thead><tr><th></th><th>file</th><th class=n>rows</th><th class=n>pass</th><th class=n>rejected</th><th></th>"
        f"</tr></thead><tbody>{body}</tbody></table>"
    )


def _recommended(report: Report) -> str:
    if not report.lines:
        return "<section><h2>Recommended</h2><p>Nothing in the configuration needs to change.</p></section>"
    return (
        "<section><h2>Recommended</h2><p>A configuration that goes after the recipe, as a second <code>--config</code>.</p>"
        f"<pre>{escape(as_yaml(report.lines))}</pre></section>"
    )


def _findings(report: Report, kind: Kind, count: int, thumbnails: Thumbnails) -> str:
    found = [finding for finding in report.findings if finding.kind == kind]
    cards = "".join(_card(finding, thumbnails) for finding in found[:MOST_SHOWN])
    more = f"<p>and {count - MOST_SHOWN:,} more, which the JSON names</p>" if count > MOST_SHOWN else ""
    verdict = "these rows do not pass" if kind in report.reject else "these rows pass"
    return (
        f'<section id="{kind}"><h2>{escape(TITLES[kind])} <b>{count:,}</b><small>{verdict}</small></h2>'
        f'<div class="cards">{cards}</div>{more}</section>'
    )


def _card(finding: Finding, thumbnails: Thumbnails) -> str:
    pictures = thumbnails(finding.place)
    if finding.other is not None:
        pictures += thumbnails(finding.other)
    medium = f"<b>{escape(finding.medium)}</b>" if finding.medium else ""
    shape = "card" if finding.other is None else "card pair"
    return (
        f'<div class="{shape}">{f"<div class=media>{pictures}</div>" if pictures else ""}<div>{medium}'
        f"<p>{escape(finding.reason)}</p><small>{escape(str(finding.origin))} · {escape(finding.split)}</small></div></div>"
    )


def _lengths(report: Report) -> str:
    lengths = report.lengths
    if lengths.all is None:
        return ""
    legend = "".join(
        f'<span><i style="background:{COLOURS[kind]}"></i>{kind}</span>' for kind in KINDS if kind in lengths.by_kind
    )
    bins = lengths.all.histogram
    marks = [*_lines(lengths.all), (lengths.max_length, f"max_length {lengths.max_length:,}")]
    marks = marks if lengths.max_length <= 2 * lengths.all.longest else marks[:-1]
    plots = [f"<h3>a row</h3>{bars(lengths.composition, list(COLOURS.values()), bins.start, bins.width, marks)}"]
    for kind, summary in lengths.by_kind.items():
        own = summary.histogram
        if len(own.counts) == 1:
            continue  # the table says it
        plot = bars([[count] for count in own.counts], [COLOURS[kind]], own.start, own.width, _lines(summary))
        plots.append(f"<h3>{kind}, in {summary.num_rows:,} rows that have some</h3>{plot}")
    rows = {"a row": lengths.all, **lengths.by_kind}
    body = "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td class=n>{number:,}</td>" for number in _figures(summary)) + "</tr>"
        for name, summary in rows.items()
    )
    head = "".join(f"<th class=n>{name}</th>" for name in ("rows", "50 %", "95 %", "99 %", "longest", "all together"))
    return (
        f"<section><h2>Lengths in tokens</h2><p>{escape(length_facts(report))}.</p><table><thead><tr><th></th>{head}</tr></thead>"
        f'<tbody>{body}</tbody></table><p class="legend">{legend}</p>'
        f'<div class="plots">{"".join(f"<figure>{plot}</figure>" for plot in plots)}</div></section>'
    )


def _figures(summary: LengthSummary) -> tuple[int, ...]:
    return (summary.num_rows, *summary.lines, summary.longest, summary.total)


def _lines(summary: LengthSummary) -> list[tuple[float, str]]:
    """The quantiles as marks; those that fall together as one."""
    names: dict[int, list[str]] = {}
    for value, name in zip(summary.lines, ("50", "95", "99"), strict=True):
        names.setdefault(value, []).append(name)
    return [(value, f"{', '.join(shares)} %: {value:,}") for value, shares in names.items()]


def _media(report: Report) -> str:
    if not report.media:
        return ""
    units = {"image": "pixels", "video": "pixels a frame", "audio": "seconds"}
    body = "".join(
        f"<tr><td>{media.modality}</td><td class=n>{media.occurrences:,}</td><td class=n>{media.different:,}</td>"
        + "".join(f"<td class=n>{size:,.{1 if media.modality == 'audio' else 0}f}</td>" for size in media.size)
        + f"<td>{units[media.modality]}</td></tr>"
        for media in report.media
    )
    head = "".join(f"<th class=n>{name}</th>" for name in ("in rows", "different", "smallest", "median", "largest"))
    words = f"<p>{escape(words_fact(report))}.</p>" if report.judged_words else ""
    return (
        f"<section><h2>Media</h2><table><thead><tr><th></th>{head}<th></th></tr></thead><tbody>{body}</tbody></table>{words}"
        f'<div class="plots">{"".join(f"<figure>{plot}</figure>" for plot in _measures(report))}</div></section>'
    )


def _measures(report: Report) -> Iterator[str]:
    if report.sharpness:
        tenths = np.round(10 * np.log10(np.maximum(report.sharpness, 1))).astype(np.int64)
        bins = histogram(tenths)
        mark = (10 * math.log10(max(report.thresholds.blur, 1)), f"blur {report.thresholds.blur:g}")
        labels = [(10.0 * power, f"{10**power:,}") for power in range(6)]
        plot = bars([[count] for count in bins.counts], ["var(--image-tokens)"], bins.start, bins.width, [mark], labels)
        yield f"<h3>sharpness of images: variance of the Laplacian, logarithmic</h3>{plot}"
    if report.levels_db:
        levels = np.round(np.maximum(report.levels_db, -100)).astype(np.int64)
        bins = histogram(levels)
        mark = (report.thresholds.silence_db, f"silence {report.thresholds.silence_db:g}")
        plot = bars([[count] for count in bins.counts], ["var(--audio-tokens)"], bins.start, bins.width, [mark])
        yield f"<h3>level of sounds, dB of full scale</h3>{plot}"


def _balances(report: Report) -> Iterator[str]:
    for balance in report.balance:
        answers = list(balance.answers[:MOST_ANSWERS])
        if rest := sum(count for _, count in balance.answers[MOST_ANSWERS:]):
            answers.append((f"{len(balance.answers) - MOST_ANSWERS:,} others", rest))
        places = ", ".join(f"{place}. {count:,}" for place, count in enumerate(balance.places, 1))
        body = "".join(
            f"<tr><td>{escape(answer)}</td><td class=n>{count:,}</td><td class=n>{100 * count / balance.num_rows:.1f} %</td>"
            f"<td>{share_bar(count / balance.num_rows, 'var(--text-tokens)')}</td></tr>"
            for answer, count in answers
        )
        yield (
            f"<section><h2>Answers of {escape(balance.part)}</h2><p>{balance.num_rows:,} rows have choices. Always the most "
            f"frequent answer: {100 * balance.majority:.1f} % right. Place of the right one among the choices: {places}.</p>"
            f"<table><tbody>{body}</tbody></table></section>"
        )


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What is in the data</title>
<style>$style</style>
</head>
<body>
<h1>What is in the data</h1>
$sections
</body>
</html>
""")
