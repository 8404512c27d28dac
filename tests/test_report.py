"""What the report says and how it looks: sentences for every outcome, hostile strings, one file that needs nothing."""

from __future__ import annotations

import dataclasses
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gmail_cli.components import report
from gmail_cli.components.metrics.intervals import Bootstrap
from gmail_cli.components.report import gallery, names, plots
from gmail_cli.components.report.records import Chart, Cloud, Curve
from gmail_cli.components.scores import Cell, Scores, results
from gmail_cli.errors import InputError

HOSTILE = "<script>alert(1)</script>\"'&|`*_[x](javascript:1)"


def jpeg(colour: str = "red", size: int = 200) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size // 2), colour).save(stream, "JPEG")
    return stream.getvalue()


def measured(
    naive: float, aligned: float, real: float, *, task: str = "clip-text", metric: str = "text_to_image_recall_at_1"
) -> list[Cell]:
    """Three arms of 400 queries with these shares of right answers; two seeds with the same answers."""
    queries = np.arange(400)
    return [
        Cell(
            task=task,
            arm=arm,
            seed=seed,
            scores={metric: Scores.mean((queries < share * 400).astype(float), groups=queries)},
        )
        for arm, share in (("generated-naive", naive), ("generated-aligned", aligned), ("real", real))
        for seed in (0, 1)
    ]


def document(*cells: Cell) -> dict[str, Any]:
    return results(cells, protocol="scenes-1k/1", bootstrap=Bootstrap(draws=200))


def picture() -> report.Picture:
    return report.Picture(report.thumbnail(jpeg(), side=32), HOSTILE, marked=True)


def full(text: str = HOSTILE) -> report.Report:
    """A report that uses every section, with one text everywhere."""
    gap = [
        Cell(task="gap", arm=arm, scores={"paired_cosine": Scores.mean(np.full(5, value), groups=np.arange(5))})
        for arm, value in (("generated-naive", 0.52), ("generated-aligned", 0.89))
    ]
    points = np.random.default_rng(0).standard_normal((20, 2))
    curve = Curve(
        "generated-aligned", text, (1.0, 5.0, 10.0), (10.0, 20.0, 30.0), (9.0, 18.0, 27.0), (11.0, 22.0, 33.0)
    )
    chart = Chart(text, text, text, (curve,))
    row = report.PictureRow(text, (picture(),), text)
    return report.Report(
        title=text,
        results=document(*measured(0.4, 0.6, 0.8), *gap),
        recall_charts=(chart,),
        training_charts=(chart,),
        clouds=(Cloud(text, text, points, points + 1), Cloud(text, text, points, points)),
        by_attribute=(report.Breakdown(text, (text, "b"), (3, 4), {"real": (0.2, 0.4), "none": (0.1, 0.9)}),),
        pairs=(row,),
        best=(row,),
        worst=(row,),
        captions=((text, (report.CaptionExample(picture(), (text,), (("real", text),)),)),),
        notes=(text,),
        provenance=((text, text),),
    )


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether its tags close in order."""

    VOID = frozenset({"meta", "img", "br", "link", "line", "circle", "rect", "path", "polyline", "polygon"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


# -- verdicts ----------------------------------------------------------------------------------------------------


def test_a_win_is_stated_with_size_interval_seeds_and_share() -> None:
    found = report.verdict(document(*measured(0.4, 0.6, 0.8)))
    assert found.headline == (
        "Alignment helps the text tower (text→image R@1 +20.0 points, 50 % of the way to real images)."
    )
    [finding] = found.findings
    assert finding.outcome == "better"
    assert re.fullmatch(
        r"Text tower: text→image R@1 with aligned generated images is 20\.0 points above that with the same images "
        r"taken as real \(95 % interval \+1\d\.\d to \+2\d\.\d; above in 2 of 2 seeds\); 50 % of the distance to "
        r"training on real images is closed \(4\d to 5\d %\)\.",
        finding.sentence,
    )


def test_a_loss_is_stated_as_plainly() -> None:
    found = report.verdict(document(*measured(0.6, 0.4, 0.8)))
    assert found.headline == "Alignment hurts the text tower (text→image R@1 −20.0 points)."
    assert "20.0 points below" in found.findings[0].sentence
    assert "the distance to training on real images grows by 100 %" in found.findings[0].sentence


def test_no_difference_is_stated_as_that() -> None:
    found = report.verdict(document(*measured(0.6, 0.6, 0.8)))
    assert found.headline == "Alignment makes no measurable difference to the text tower (text→image R@1 +0.0 points)."
    assert found.findings[0].outcome == "unclear"
    assert re.search(
        r"images is equal to that with .* \(95 % interval \+0\.0 to \+0\.0; equal in 2 of 2 seeds\)",
        found.findings[0].sentence,
    )
    assert names.beside("cider", -0.0002, "real") == "less than 0.1 points below real"


def test_no_distance_to_close_is_said() -> None:
    found = report.verdict(document(*measured(0.6, 0.7, 0.6)))
    assert "so there is no distance to close" in found.findings[0].sentence
    assert "%" not in found.headline


def test_seeds_that_disagree_are_no_win() -> None:
    cells = measured(0.4, 0.6, 0.8)
    queries = np.arange(400)
    worse = Scores.mean((queries < 150).astype(float), groups=queries)
    swapped = [
        Cell(task=cell.task, arm=cell.arm, seed=cell.seed, scores={"text_to_image_recall_at_1": worse})
        if (cell.arm, cell.seed) == ("generated-aligned", 1)
        else cell
        for cell in cells
    ]
    found = report.verdict(document(*swapped))
    assert document(*swapped)["comparisons"][0]["low"] > 0
    assert found.findings[0].outcome == "unclear"
    assert "above in 1 of 2 seeds" in found.findings[0].sentence


def test_several_tasks_are_gathered_in_one_sentence() -> None:
    cells = [*measured(0.4, 0.6, 0.8), *measured(0.5, 0.3, 0.8, task="clipcap", metric="cider")]
    assert report.verdict(document(*cells)).headline == (
        "Alignment helps the text tower (text→image R@1 +20.0 points, 50 % of the way to real images) "
        "and hurts captioning (CIDEr −20.0 points)."
    )


@pytest.mark.parametrize(
    ("untrained", "headline", "sentence"),
    [
        (
            0.7,
            " Without any training, the text tower did better than on generated images.",
            "10.0 points below no training",
        ),
        (0.5, "", "10.0 points above no training"),
        (0.6, "", "; it is equal to no training (+0.0 to +0.0, no measurable difference)"),
    ],
)
def test_no_training_is_not_passed_over(untrained: float, headline: str, sentence: str) -> None:
    none = Cell(
        task="clip-text",
        arm="none",
        scores={
            "text_to_image_recall_at_1": Scores.mean((np.arange(400) < 400 * untrained) * 1.0, groups=np.arange(400))
        },
    )
    found = report.verdict(document(none, *measured(0.4, 0.6, 0.8)))
    assert found.headline.endswith(f"of the way to real images).{headline}")
    assert sentence in found.findings[0].sentence


def test_without_arms_the_first_number_is_the_headline() -> None:
    alone = measured(0.4, 0.6, 0.8)[0]
    assert re.fullmatch(
        r"Text→image R@1 is 40\.0 % \(3\d\.\d to 4\d\.\d\) over 400 queries for the text tower trained on "
        r"generated-naive images\.",
        report.verdict(document(alone)).headline,
    )
    untrained = dataclasses.replace(
        alone,
        arm="none",
        seed=None,
        scores={"text_to_image_recall_at_1": Scores.mean(np.ones(400), groups=np.arange(400))},
    )
    assert report.verdict(document(untrained)).headline.endswith(" over 400 queries.")
    assert "is 40.0 %" in report.verdict(document(untrained, alone)).headline
    assert "Nothing to compare" in report.verdict(document()).headline


# -- pages -------------------------------------------------------------------------------------------------------


def test_hostile_strings_stay_text_everywhere() -> None:
    page = Page(report.html(full()))
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) >= 15


def test_the_page_needs_nothing_else() -> None:
    html = report.html(full("a plain caption"))
    page = Page(html)
    assert {"link", "script", "iframe", "object"}.isdisjoint(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert sources
    assert all(value.startswith(("data:image/", "#")) for value in sources)
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in page.attributes


def test_sections_without_content_are_left_out() -> None:
    bare = report.html(report.Report(title="t", results=document(measured(0.4, 0.6, 0.8)[0])))
    for title in ("The arms", "Paired", "gap between", "Recall at k", "By class", "Retrievals", "Captions", "Training"):
        assert title not in bare
    assert "All numbers" in bare


def test_a_report_of_nothing_is_still_a_page() -> None:
    Page(report.html(report.Report(title="t", results=document())))


def test_markdown_tables_survive_hostile_strings() -> None:
    text = report.markdown(full())
    assert "<script>" not in text
    columns = {
        line.replace("\\|", "").count("|")
        for line in text.splitlines()
        if line.startswith("| clip") or "Text tower |" in line
    }
    assert columns == {7} | columns
    assert all(
        line.replace("\\|", "").count("|") == 3
        for line in text.splitlines()
        if "alert(1)" in line and line.startswith("|")
    )


def test_the_numbers_of_the_tables_are_those_of_the_results() -> None:
    text = Page(report.html(full())).text
    assert "40.0" in text
    assert "+20.0" in text
    assert "0.520" in text
    assert "0.890" in text


def test_the_search_page_escapes_and_shows_scores() -> None:
    page = Page(report.search_page(HOSTILE, [("id-1", HOSTILE, 0.81234), ("id-2", "", 0.5)], [jpeg(), None]))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) == 3  # title, heading, text
    assert "0.8123" in page.text
    assert "no image" in page.text


# -- parts -------------------------------------------------------------------------------------------------------


def test_thumbnails_are_small_and_never_larger_than_the_image() -> None:
    for side, size in ((50, (50, 25)), (500, (200, 100))):
        with Image.open(io.BytesIO(report.thumbnail(jpeg(), side=side))) as image:
            assert image.size == size
    with pytest.raises(InputError, match="photo 7"):
        report.thumbnail(b"no image", side=50, name="photo 7")


def test_charts_name_their_lines_from_top_to_bottom_and_take_texts_as_they_are() -> None:
    curves = tuple(Curve(arm, f"{arm} $x$", (1.0, 2.0), (0.0, y)) for arm, y in (("none", 1.0), ("real", 3.0)))
    chart = plots.line_chart(Chart("t", "x", "y", curves))
    assert [text for text in re.findall(r">([^<]+)</text>", chart) if "$" in text] == ["real $x$", "none $x$"]
    assert "var(--real)" in chart
    assert not re.search(r"#[0-9a-f]{6}\b", chart), "a colour that the page cannot change"
    assert chart == plots.line_chart(Chart("t", "x", "y", curves))


def test_metric_names_and_values_for_people() -> None:
    assert names.metric_label("long_image_to_text_recall_at_5") == "long image→text R@5"
    assert names.metric_label("zero_shot_top_1_accuracy") == "zero-shot accuracy"
    assert names.show("cider", 1.083) == "108.3"
    assert names.show("paired_cosine", -0.52) == "−0.520"
    assert names.show("bleu_4", None) == "–"
    order = sorted(
        ["image_to_text_recall_at_1", "text_to_image_recall_at_10", "text_to_image_recall_at_5"], key=names.metric_rank
    )
    assert order == ["text_to_image_recall_at_5", "text_to_image_recall_at_10", "image_to_text_recall_at_1"]


def test_breakdown_puts_the_most_helped_label_first() -> None:
    correct = {"generated-naive": np.array([1.0, 0, 0, 1]), "generated-aligned": np.array([0.0, 1, 1, 1])}
    found = gallery.breakdown("t", labels=["a", "b", "b", "c"], values=correct)
    assert found is not None
    assert found.labels == ("b", "c", "a")
    assert found.counts == (2, 1, 1)
    assert found.arms["generated-aligned"] == (1.0, 1.0, 0.0)
    assert gallery.breakdown("t", labels=["a"] * 4, values=correct) is None
    many = np.arange(100)
    ends = gallery.breakdown("t", labels=[f"{each:02}" for each in many], values={"real": many / 100})
    assert ends is not None
    assert ends.title == "t (the first and the last 20 of 100)"
    assert ends.labels == (*(f"{each:02}" for each in many[:20]), *(f"{each:02}" for each in many[-20:]))


def test_clouds_share_their_plane_and_their_real_points() -> None:
    rng = np.random.default_rng(0)
    real = rng.standard_normal((30, 8)).astype(np.float32)
    before, after = gallery.clouds(real, naive=real + 3, aligned=real + 0.1)
    np.testing.assert_array_equal(before.real, after.real)
    shift = np.linalg.norm((before.generated - before.real).mean(axis=0))
    assert shift > 10 * np.linalg.norm((after.generated - after.real).mean(axis=0))


def test_best_and_worst_retrievals_are_the_surest_and_the_farthest() -> None:
    from gmail_cli.components.metrics.retrieval import retrieval_ranks

    images = np.eye(4, dtype=np.float32)
    texts = np.array([[0.9, 0.1, 0, 0], [0.5, 0.6, 0, 0], [0.7, 0.5, 0.1, 0.4], [0, 0, 0.6, 0.5]], dtype=np.float32)
    ranks = retrieval_ranks(images, texts=texts, owners=np.arange(4)).text_to_image
    best, worst = gallery.retrievals(
        images,
        texts=texts,
        image_ids=list("abcd"),
        captions=["ta", "tb", "tc", "td"],
        ranks=ranks,
        thumbnails=lambda image: jpeg(),
        note="n",
        count=2,
    )
    assert [row.text for row in best] == ["ta", "tb"]
    assert [row.text for row in worst] == ["tc", "td"]
    assert worst[0].note == "place 4 of 4; n"
    assert [picture.marked for picture in best[0].pictures] == [True, False, False, False]


def test_a_training_curve_is_averaged_to_a_readable_number_of_points() -> None:
    rows = [{"step": step, "loss": float(step % 2)} for step in range(1000)]
    chart = gallery.training_chart("t", {"real": rows, "none": []})
    assert chart is not None
    [curve] = chart.curves
    assert len(curve.x) == gallery.CURVE_POINTS
    assert np.mean(curve.y) == pytest.approx(0.5, abs=0.05)
    assert gallery.training_chart("t", {"none": []}) is None


def test_breakdown_by_attribute_worked_by_hand() -> None:
    seen = [{"colour": "red", "sky": "day"}, {"colour": "blue", "sky": "day"}, {"colour": "red"}, {"sky": "day"}]
    values = {"real": np.array([1.0, 0.0, 0.5, np.nan]), "none": np.array([0.0, 0.0, 0.0, 1.0])}
    found = gallery.attribute_breakdown("t", attributes=seen, values=values)
    assert found is not None
    assert found.labels == ("colour: blue", "colour: red"), "one sky is no breakdown"
    assert found.counts == (1, 2), "the fourth image was not asked in every arm"
    assert found.arms == {"none": (0.0, 0.0), "real": (0.0, 0.75)}
    assert gallery.attribute_breakdown("t", attributes=[{}] * 4, values=values) is None
    many = [{f"a{each}": side for each in range(90)} for side in ("x", "y", "x", "y")]
    shown = gallery.attribute_breakdown("t", attributes=many, values=values)
    assert shown is not None
    assert len(shown.labels) == gallery.MOST_ROWS


def test_every_captioning_task_shows_its_captions() -> None:
    def example(text: str) -> tuple[report.CaptionExample, ...]:
        return (report.CaptionExample(None, ("a reference",), (("real", text),)),)

    both = (("Captioning", example("says clipcap")), ("Captioning by LLaVA", example("says llava")))
    text = Page(report.html(report.Report(title="t", results=document(), captions=both))).text
    for wanted in ("says clipcap", "says llava", "Captioning by LLaVA"):
        assert wanted in text


def test_latex_tables_have_the_columns_of_the_paper() -> None:
    cells = []
    for arm, value in (("real", 0.5), ("none", 0.25)):
        hits = Scores.mean(np.arange(40) < 40 * value, groups=np.arange(40))
        names_ = [f"{way}_recall_at_{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5)]
        cells.append(Cell(task="clip-text", arm=arm, scores=dict.fromkeys(names_, hits)))
    results_ = document(*cells) | {"protocol": "a_b%"}
    text = report.latex_tables(results_)
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert rows[0] == r" & \multicolumn{2}{c}{Image-to-Text} & \multicolumn{2}{c}{Text-to-Image} \\"
    assert rows[1] == r" & R@1 & R@5 & R@1 & R@5 \\"
    assert [row.split(" &")[0] for row in rows[2:]] == ["none", "real"]
    assert all(row.count("&") == 4 for row in rows[1:])
    assert r"\cmidrule(lr){2-3}" in text
    assert r"\cmidrule(lr){4-5}" in text
    assert "Image-to-Text R@1 | Image-to-Text R@5 | Text-to-Image R@1" in report.markdown(
        report.Report(title="t", results=results_)
    )
    assert report.latex_tables(document()).startswith("% protocol")
