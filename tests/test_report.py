"""Tables and pictures from run folders, whole, damaged or of another kind."""

import html
import itertools
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from pictures import drawn
from PIL import Image
from small_runs import confirm, latency_of, run

from bmsn_zoo import report
from bmsn_zoo.axis import Axis
from bmsn_zoo.ranking import ties
from bmsn_zoo.report import search_table
from bmsn_zoo.results import SearchResult, TrainResult

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@drawn()
def test_both_kinds_of_runs_are_drawn_and_told(runs, capsys, tmp_path):
    folders = [shutil.copytree(getattr(runs, name), tmp_path / name) for name in ("search", "found", "default")]
    for folder in folders:
        shutil.rmtree(folder / "pictures")
    capsys.readouterr()
    assert run(report, *folders) == 0
    printed = capsys.readouterr().out
    assert printed.count("layouts, ranked by score-split accuracy") == 1
    assert printed.count("test accuracy ") == 2
    for folder, pictures in zip(folders, (3, 1, 1), strict=True):
        assert len(list((folder / "pictures").glob("*.png"))) == pictures
        for file in (folder / "pictures").iterdir():
            assert file.read_bytes() == (getattr(runs, folder.name) / "pictures" / file.name).read_bytes()


def test_a_search_without_an_assignment_has_no_picture_of_it(runs, capsys, tmp_path):
    folder = shutil.copytree(runs.search, tmp_path / "search", ignore=shutil.ignore_patterns("pictures"))
    search = SearchResult.read(folder / "search.json")
    search.model_copy(update={"assignment_matrix": None, "scores": None}).write(folder / "search.json")
    assert run(report, folder) == 0
    assert sorted(file.name for file in (folder / "pictures").iterdir()) == ["accuracy_macs.png", "curves.png"]


@drawn()
def test_steps_are_drawn_of_each_of_several_supernets_but_not_of_one(runs, capsys, tmp_path):
    folder = shutil.copytree(runs.search, tmp_path / "search")
    assert run(report, folder) == 0 and "steps of each supernet" in (folder / "report.html").read_text("utf-8")
    width = Image.open(folder / "pictures" / "curves.png").width
    search = SearchResult.read(folder / "search.json")
    ranking = [entry.model_copy(update={"supernet": 0}) for entry in search.ranking]
    alone = {"mixture_size": 1, "assignment_matrix": None, "scores": None, "ranking": ranking}
    alone["accuracy_matrix"] = [[max(row)] for row in search.accuracy_matrix]
    search.model_copy(update=alone).write(folder / "search.json")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    rows = [row | {"draws": [sum(row["draws"])], "assigned": []} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert run(report, folder) == 0 and "steps of each supernet" not in (folder / "report.html").read_text("utf-8")
    assert Image.open(folder / "pictures" / "curves.png").width < width


class Page(HTMLParser):
    """Elements of a page in their order, and the text outside scripts and styles; tags that do not match are errors."""

    VOID = ("meta", "link", "br", "input")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data * (self.open[-1:] not in (["script"], ["style"]))

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def hostile(runs, tmp_path_factory):
    """Two searches and a training, whose names want to be code; the names."""
    base, code = tmp_path_factory.mktemp("<b>&amp;"), "</script><script>document.title = 'taken'</script><img src=x>"
    for number, kind in enumerate(("search", "search", "found")):
        folder = shutil.copytree(getattr(runs, kind), base / f"<i>{number}")
        file = folder / ("search.json" if kind == "search" else "metrics.json")
        result = (SearchResult if kind == "search" else TrainResult).read(file)
        named = {"id": f"data{code}", "label_names": [code, "{{ 7 * 7 }}", "'\"`", "plain"], "on_hub": False}
        data = result.dataset.model_copy(update=named)
        changed = {"dataset": data, "seed": number, "commit": code}
        changed |= {"latency": latency_of(result, code)} if kind == "search" else {}
        result.model_copy(update=changed).write(file)
    assert run(report, *sorted(base.iterdir()), "--output", base / "page.html") == 0
    return base / "page.html", code


def test_the_page_needs_no_network_and_runs_nothing_of_strangers(hostile):
    path, code = hostile
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(text.encode()) < 3_000_000
    assert page.count("script") == page.count("h1") == page.count("main") == 1 and page.count("img") == 0
    assert page.text.count(code) >= 9 and "{{ 7 * 7 }}" in page.text
    assert "://" not in text.replace(code, "")
    for _, attributes in page.elements:
        assert not {"src", "srcset", "onclick", "onerror"} & set(attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names)) == 3
    for element, attributes in page.elements:  # what the eye sees of pictures is told, what scrolls is reached by keys
        assert element != "svg" or attributes["aria-label"]
        assert attributes.get("class") != "scroll" or attributes["tabindex"] == "0"


def test_the_page_tells_what_was_found(runs, tmp_path):
    assert run(report, runs.search, "--output", tmp_path / "new" / "page.html") == 0
    result, page = SearchResult.read(runs.search / "search.json"), Page((tmp_path / "new" / "page.html").read_text())
    assert f"{result.best.layout} is ranked first" in page.text
    assert ("(a tie)" in page.text) == (result.best != result.default), "32 images show nothing"
    tied = [entry for entry in result.ranking[1:] if ties(entry.accuracy, result.best.accuracy, 32)]
    assert f"{len(tied)} other layouts cannot be told from the first" in page.text
    assert search_table(result, 36).partition("Pareto")[0].count("  ~") == len(tied), "by one rule"
    labels = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    for entry in result.pareto_front:
        assert any(label.startswith(f"layout {entry.layout}: side 16, ") for label in labels)
    assert page.text.count("\n4-3-3") <= 1
    for pick in ("best", "best_within_default_macs", "default"):
        assert f" --from-search {runs.search} --pick {pick}" in page.text
    undecided = tmp_path / "undecided"
    shutil.copytree(runs.search, undecided)
    result.model_copy(update={"undecided": "all are alike"}).write(undecided / "search.json")
    assert run(report, undecided) == 0
    page = Page((undecided / "report.html").read_text())
    assert "No winner: all are alike. Keep the default 4-3-3." in page.text
    assert "ranked first" not in page.text and "--pick best\n" not in page.text


def test_the_page_shows_the_assignment_over_time(runs, tmp_path):
    folder = shutil.copytree(runs.search, tmp_path / "run")
    row = json.loads((folder / "metrics.jsonl").read_text())
    assert len(row["assigned"]) == 36 and set(row["assigned"]) <= {0, 1}
    epochs = [[0] * 30 + [1] * 6, [0] * 20 + [1] * 16, [0] * 18 + [1] * 18]
    lines = [json.dumps({**row, "epoch": number, "assigned": epochs[number - 1]}) for number in (1, 2, 3)]
    for written, shown in ((lines, True), ([lines[0]], False)):  # of one epoch there is no change
        (folder / "metrics.jsonl").write_text("\n".join(written) + "\n")
        assert run(report, folder) == 0
        labels = " ".join(
            attributes.get("aria-label", "") for _, attributes in Page((folder / "report.html").read_text()).elements
        )
        assert ("layouts assigned to each supernet" in labels) == ("layouts that changed supernet" in labels) == shown


def test_the_page_of_a_confirmed_search_says_what_was_shown(runs, tmp_path):
    folder = shutil.copytree(runs.search, tmp_path / "run")
    for p_value, verdict in ((0.004, "5-3-2 beats the default 4-3-3 by 5.0 points"), (0.3, "keep 4-3-3")):
        confirm(folder, p_value)
        assert run(report, folder) == 0
        page = Page((folder / "report.html").read_text())
        assert verdict in page.text and f"p = {p_value:.2g}" in page.text and "80 images better, 30 worse" in page.text


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
@pytest.mark.parametrize("width", [360, 1400])
def test_a_browser_shows_it_whole(width, hostile, tmp_path):
    """Nothing is wider than the window, nothing goes wrong, rows sort and can be sought, names stay names."""
    look = """<script>
    const told = [document.title.includes("taken"), document.documentElement.scrollWidth > innerWidth, innerWidth];
    const cut = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, svg, pre, head")
      && e.getBoundingClientRect().right > innerWidth + 0.5);
    const section = document.querySelector("section"), rows = () => [...section.querySelectorAll(".ranked tr")];
    section.querySelectorAll(".sort")[4].click();
    const costs = rows().slice(0, 36).map(row => Number(row.cells[4].textContent));
    const filter = section.querySelector(".filter");
    filter.value = "4-3-3"; filter.dispatchEvent(new Event("input"));
    const left = section.querySelector(".ranked").querySelectorAll("tr:not([hidden])").length;
    const written = [...document.querySelectorAll("svg")].flatMap(svg => {
      const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
      const meet = (a, b) => Math.max(a.left, b.left) < Math.min(a.right, b.right) - 1
        && Math.max(a.top, b.top) < Math.min(a.bottom, b.bottom) - 2;
      return boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([, b]) => meet(a, b)).map(([two]) => one + two));
    });
    told.push(written, cut.map(e => e.outerHTML.slice(0, 80)), costs.every((v, i) => !i || costs[i - 1] <= v), left);
    parent.document.body.dataset.told = JSON.stringify(told);
    </script>"""
    inside = html.escape(hostile[0].read_text(encoding="utf-8").replace("</body>", look + "</body>"))
    frame = f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{inside}"></iframe>'
    page = tmp_path / "page.html"  # in a frame, since no window of a desktop is as narrow as a phone
    page.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}</body>", encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    started = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'user'}", "--window-size=1500,1000"]
    done = subprocess.run([*started, page.as_uri()], capture_output=True, text=True, timeout=100)
    taken, wider, inner, written, cut, sorted_, left = json.loads(
        html.unescape(re.search('data-told="([^"]*)"', done.stdout)[1])
    )
    assert (taken, wider, inner, cut, sorted_, left) == (False, False, width, [], True, 1)
    assert written == [], "one text over another"
    assert "CONSOLE" not in done.stderr


def test_colors_are_told_apart_from_their_backgrounds_by_day_and_by_night(runs, tmp_path):
    """WCAG's contrast: 4.5 of text, 3 of what is drawn."""

    def light(color):
        channels = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), channels, strict=True))

    def contrast(one, other):
        low, high = sorted(map(light, (one, other)))
        return (high + 0.05) / (low + 0.05)

    run(report, runs.search, "--output", tmp_path / "page.html")
    schemes = re.findall(r":root \{(.*?)\}", (tmp_path / "page.html").read_text(encoding="utf-8"), re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colors = {}
        for name, digits in re.findall(r"--(\w+): #(\w+)", scheme):
            digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
            colors[name] = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        backs = [colors.pop("back"), colors.pop("card")]
        colors.pop("line")  # only leads the eye
        for name, color in colors.items():
            least = 4.5 if name in ("text", "soft", "c1") else 3
            assert all(contrast(color, back) >= least for back in backs), name
        darkest = [int(part) / 255 for part in re.search(r"--cell: (\d+) (\d+) (\d+)", scheme).groups()]
        darkest = [0.45 * part + 0.55 * back for part, back in zip(darkest, backs[0], strict=True)]
        assert contrast(colors["text"], darkest) >= 4.5


@pytest.mark.parametrize("low", [0.021, 1.2, 3.0, 37.3, 990.0])
def test_an_axis_has_some_ticks_whatever_it_shows(low):
    for ratio in (1.01, 1.5, 2.2, 3.5, 6.0, 9.0, 12.0, 40.0, 200.0):
        axis = Axis.of([low, low * ratio], 0, 300, log=True)
        places = [axis.at(tick) for tick in axis.ticks]
        assert 3 <= len(places) <= 9 and places == sorted(places) and places[0] >= 0 and places[-1] <= 300
        assert min(b - a for a, b in itertools.pairwise(places)) > 14, "and none is written over another"


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        report.main(["--help"])
    assert ended.value.code == 0
    assert "RUN_FOLDER" in capsys.readouterr().out


def damaged(content, rng):
    """Some bytes changed, cut, doubled or replaced by what a reader may trip over."""
    position = rng.randrange(len(content))
    junk = rng.choice([b"\xff", b"null", b"NaN", b"-1", b"1e999", b"[" * 5000, b"9" * 5000, b'"x"', b"\n", b""])
    length = rng.choice([0, 1, 5, 200, len(content)])
    return content[:position] + junk + content[position + length :]


@drawn()
@pytest.mark.parametrize("times", [8, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["search", "found"])
def test_a_damaged_run_ends_in_one_line_or_in_its_pictures(kind, times, runs, tmp_path, capsys):
    rng = random.Random(kind)
    result = "search.json" if kind == "search" else "metrics.json"
    folder = tmp_path / "run"
    folder.mkdir()
    for _ in range(times):
        for name in (result, "metrics.jsonl"):
            shutil.copy(getattr(runs, kind) / name, folder)
        name = rng.choice([result, "metrics.jsonl", "metrics.jsonl"])
        (folder / name).write_bytes(damaged((folder / name).read_bytes(), rng))
        capsys.readouterr()
        code = run(report, folder)
        error = capsys.readouterr().err
        assert code in (0, 2)
        assert error.count("\n") == (1 if code else 0), error
        assert len(error) < 800


def test_folders_that_hold_no_run(runs, tmp_path, capsys):
    shutil.copy(runs.search / "search.json", tmp_path)
    (tmp_path / "empty").mkdir()
    for folder, said in ((tmp_path / "nothing", "holds no finished run"), (tmp_path / "empty", "holds no finished run"),
                         (tmp_path, "metrics.jsonl cannot be read: No such file")):  # fmt: skip
        capsys.readouterr()
        assert run(report, folder) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
