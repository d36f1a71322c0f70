"""The page that shows an evaluation: what it says, that it stands alone, and how a browser shows it."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.special import erf

from qmprop import charts, evaluation, findings, report
from qmprop.__main__ import run
from qmprop.errors import OutputError, QmpropError, UsageError
from qmprop.evaluation import PAPER_MAE, Details, Report
from qmprop.report import check_report, render_report, write_report
from qmprop.targets import DEFAULT_KEYS, TARGETS

SECTIONS = ("errors", "properties", "intervals", "groups", "worst", "reproduce")
SMILES = ("CC(=O)CO", "C1CC1N", "N#CCF", "CCCC", "C[NH2+]CC([O-])=O")
COUNTS = ((6, 3, 0, 2, 0), (7, 3, 1, 0, 0), (2, 2, 1, 0, 1), (10, 4, 0, 0, 0), (7, 3, 1, 2, 0))
#: Typical values and errors in default units.
VALUES = (2.7, 75.0, -6.5, 0.3, 6.9, 1190.0, 4.1, -11178.0, -11178.0, -11178.0, -11179.0, 31.6)
SPREADS = (1.5, 8.0, 0.6, 1.2, 1.3, 280.0, 0.9, 1085.0, 1085.0, 1085.0, 1085.0, 4.1)
ERRORS = (0.05, 0.12, 0.04, 0.04, 0.056, 0.2, 0.0017, 0.016, 0.016, 0.016, 0.016, 0.045)


def make_details(count, *, scale=1.0, calibrated=True, drawn=True, seed=0):
    """Return molecules whose errors are Gaussian with a known width each, and intervals that know it."""
    random = np.random.default_rng(seed)
    references = np.array(VALUES) + np.array(SPREADS) * random.normal(size=(count, 12))
    widths = scale * np.array(ERRORS) * np.exp(0.5 * random.normal(size=(count, 12)))
    kinds = np.arange(count) % len(SMILES)
    errors = widths * random.normal(size=(count, 12))
    return Details(
        names=[f"gdb_{k + 1}" for k in range(count)],
        counts=np.array(COUNTS)[kinds],
        predictions=references + errors,
        references=references,
        half_widths=1.645 * widths if calibrated else None,
        scores=random.random(count) if calibrated else None,
        outside=np.arange(count) % 25 == 7 if calibrated else None,
        smiles=[SMILES[kind] if drawn else None for kind in kinds],
        levels=np.maximum(0.5, erf(np.abs(errors) / widths / 2.0**0.5)) if calibrated else None,
    )


def make_report(details, *, data="qm9", geometry="dft", weights="egnn-qm9@1f3a5c7e", **facts):
    """Return the report of an evaluation with these details."""
    return Report(
        data=data,
        split="test" if data == "qm9" else "all",
        geometry=geometry,
        molecules=len(details.names),
        weights=weights,
        properties=evaluation.summarize(details),
        rmsd={"given": 0.12, "refined": 0.07} if data == "qm9" else None,
        details=details,
        outside=None if details.outside is None else float(details.outside.mean()),
        **facts,
    )


def make_file_report(count, *, calibrated=False, whole=True):
    """Return the report of a user's file; unless it is `whole`, with two properties only."""
    details = make_details(count, calibrated=calibrated, drawn=False)
    details = dataclasses.replace(details, names=[str(k) for k in range(count)])
    return make_report(details if whole else without_most(details), data="labeled.extxyz", geometry="file")


def without_most(details):
    """Return the molecules with labels for mu and gap only: their page is drawn sooner."""
    references = np.full_like(details.references, np.nan)
    references[:, [0, 4]] = details.references[:, [0, 4]]
    return dataclasses.replace(details, references=references)


@pytest.fixture(scope="module")
def reports():
    """QM9 with its three kinds of geometry."""
    return [
        make_report(make_details(600)),
        make_report(make_details(590, scale=1.6, seed=1), geometry="mmff", skipped_reasons={"other bonds": 10}),
        make_report(make_details(100, scale=1.3, seed=2), geometry="xtb"),
    ]


@pytest.fixture(scope="module")
def page(reports):
    return render_report(reports, command="qmprop eval --report report.html")


class Page(HTMLParser):
    """What a page holds; fails where tags do not pair."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.ids, self.words = [], [], [], []
        self._open = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "title"):
            self.words += data.split()

    @property
    def text(self):
        return " ".join(self.words)


def check_alone(text):
    """Fail if a page needs anything else, runs anything, or does not hold together; return what it holds."""
    found = Page(text)
    assert set(found.tags) & {"script", "link", "iframe", "img", "object", "embed", "base", "form"} == set()
    links = {value for _, name, value in found.attributes if name in ("src", "href", "xlink:href", "srcset", "data")}
    assert {link for link in links if not link.startswith("#")} == set()
    assert {link[1:] for link in links} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert {name for _, name, _ in found.attributes if name.startswith("on")} == set()
    assert {value for _, name, value in found.attributes if "://" in value and not name.startswith("xmlns")} == set()
    assert re.findall(r"url\((?!#)|@import", text) == []
    return found


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_has_every_section_and_property(page):
    found = check_alone(page)
    assert [name for name in found.ids if name in SECTIONS] == list(SECTIONS)
    for key in DEFAULT_KEYS:
        target = TARGETS[key]
        assert page.count(f'<th scope="row">{key}</th>') == 2  # errors, intervals
        assert f"<h3>{key} <span>{target.symbol}, {target.description.replace(' - ', ' − ')}</span></h3>" in page
        assert f"{key}: predictions against references" in page
        assert f"{key}: distribution of errors" in page
    assert page.count("<figure") == 12 + 4
    assert "egnn-qm9@1f3a5c7e" in found.text
    assert "qmprop eval --report report.html" in found.text
    assert len(page.encode()) < 2e6


def test_the_tables_show_the_numbers_of_the_reports(page, reports):
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)]
    accuracy = next(row for row in rows if row[:2] == ["gap", "meV"])
    intervals = next(row for row in rows[rows.index(accuracy) + 1 :] if row[:2] == ["gap", "meV"])
    errors = [report.properties["gap"] for report in reports]
    assert accuracy[2:5] == [f"{item.mae:.1f}" for item in errors]
    assert accuracy[5:7] == ["48", f"{errors[0].mae / PAPER_MAE['gap']:.2f}"]
    assert accuracy[7:10] == [f"{item.rmse:.1f}" for item in errors]
    assert [float(cell.replace("−", "-")) for cell in accuracy[13:]] == [round(item.bias, 1) for item in errors]
    assert intervals[2:5] == [f"{100 * item.coverage:.1f}" for item in errors]
    assert intervals[5:8] == [f"{item.half_width:.1f}" for item in errors]
    assert intervals[8:] == [f"{item.sharpness:.2f}" for item in errors]


def test_shifts_are_shown_where_they_are_known():
    details = without_most(make_details(25))
    properties = evaluation.summarize(details)
    shifted = {key: dataclasses.replace(errors, shift=12.345) for key, errors in properties.items()}
    pair = [
        dataclasses.replace(make_report(details), properties=properties),
        dataclasses.replace(make_report(details, geometry="mmff"), properties=shifted),
    ]
    text = re.sub(r"<[^>]+>", " ", render_report(pair))
    assert "Shift: mean absolute difference" in text
    assert re.search(r"gap\s+meV\s+12\.3\s", text)
    assert "Shift" not in render_report(pair[:1])


def test_the_summary_tells_what_is_measured(page):
    text = check_alone(page).text
    assert "600 molecules of QM9’s test split (kept out of training)" in text
    assert "at their DFT geometries, and at the MMFF94 and GFN2-xTB minima a user would have." in text
    assert "MMFF94: 10 molecules without such a geometry left out (other bonds 10)." in text
    assert "24 molecules (4 %) are judged outside the domain; errors there are" in text


def test_the_worst_molecules_are_drawn_and_told(page, reports):
    details = reports[0].details
    worst = findings.find_worst(details, report.WORST)
    names = re.findall(r"<h3>(gdb_\d+)</h3>", page)
    assert names == [details.names[miss.row] for miss in worst]
    assert len(re.findall(r'aria-label="structure of gdb_\d+"', page)) == report.WORST
    assert "reference outside the interval" in page


def test_the_same_evaluation_gives_the_same_bytes(page, reports, tmp_path):
    write_report(reports, tmp_path / "page.html", command="qmprop eval --report report.html")
    assert (tmp_path / "page.html").read_bytes() == page.encode()


def digest():
    """Return the hash of a page; run in another process, too."""
    return hashlib.sha256(render_report([make_file_report(25, calibrated=True, whole=False)]).encode()).hexdigest()


def test_another_process_writes_the_same_bytes():
    code = "import test_report; print(test_report.digest())"
    folder = Path(__file__).parent
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(folder)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [digest()]


def test_a_file_with_missing_labels_shows_what_there_is():
    whole = make_file_report(60)
    references = whole.details.references.copy()
    references[:, 3:] = np.nan  # mu, alpha and homo only
    references[1::2, 1] = np.nan
    references[5] = np.nan
    found = make_report(
        dataclasses.replace(whole.details, references=references), data="labeled.extxyz", geometry="file"
    )
    text = render_report([found])
    page = check_alone(text)
    assert [key for key in DEFAULT_KEYS if f"<h3>{key} " in text] == ["mu", "alpha", "homo"]
    assert "30 molecules with a reference value." in page.text
    assert "59 molecules with a reference value." in page.text
    assert "60 molecules of labeled.extxyz are predicted and compared with the values in that file." in page.text
    assert "qmprop eval --data labeled.extxyz --report report.html" in page.text
    assert "nan" not in re.findall(r"[a-z]+", page.text)
    assert '<div class="formula">C₃H₆O₂</div>' in text


@pytest.mark.parametrize(("count", "calibrated"), [(1, False), (1, True), (3, True), (21, False), (21, True)])
def test_few_molecules_are_enough_for_a_page(count, calibrated):
    text = render_report([make_file_report(count, calibrated=calibrated, whole=False)])
    page = check_alone(text)
    assert text.count('<div class="formula">') == min(count, report.WORST)
    assert ("With fewer than 20 molecules there is nothing to compare." in page.text) == (count < 20)
    assert "nan" not in re.findall(r"[a-z]+", page.text)


def test_weights_without_calibration_say_so_and_show_no_intervals(reports):
    plain = dataclasses.replace(without_most(reports[0].details), half_widths=None, scores=None, outside=None)
    text = render_report([make_report(plain)])
    page = check_alone(text)
    assert "These weights have no calibration: their predictions come without intervals." in page.text
    assert "90 %" not in page.text
    assert "domain" not in page.text
    assert "±" not in page.text
    assert text.count("<figure") == 2


def test_hostile_names_are_only_text():
    attack = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>{{ 7 * 7 }}\x1b[2J"
    details = without_most(make_details(30))
    details = dataclasses.replace(details, names=[attack] * 30, smiles=[attack, "C" * 300, "[*:1]", "(", ""] * 6)
    found = make_report(details, data=f"/tmp/{attack}\udcff.extxyz", geometry="file", weights=attack)
    text = render_report([found], command=attack)
    page = check_alone(text)
    assert "alert(1)" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert "\x1b" not in text


def test_a_name_that_is_no_unicode_can_be_written(tmp_path):
    found = dataclasses.replace(make_file_report(2, whole=False), data="\udcff.extxyz")
    write_report([found], tmp_path / "page.html")
    check_alone((tmp_path / "page.html").read_text(encoding="utf-8"))


# --- what the errors tell ---------------------------------------------------------------------------------------------


def test_rare_sizes_share_a_group():
    details = make_details(100)
    sizes = [1] * 2 + [3] * 5 + [4] * 30 + [7] * 60 + [9] * 3
    details = dataclasses.replace(details, counts=np.array([[4, size, 0, 0, 0] for size in sizes]))
    groups = findings.group_by_size(details)
    assert [(group.name, len(group)) for group in groups] == [("1–4", 37), ("7–9", 63)]
    assert sum(group.rows.astype(int) for group in groups).tolist() == [1] * 100


def test_elements_make_groups_where_there_are_enough():
    groups = findings.group_by_element(make_details(100))
    assert [(group.name, len(group)) for group in groups] == [
        ("C and H only", 20),
        ("with N", 60),
        ("with O", 40),
        ("with F", 20),
    ]
    assert findings.group_by_element(make_details(20)) == []


def test_groups_are_compared_with_the_mean_of_all():
    details = make_details(40)
    errors = np.repeat([[1.0], [3.0]], 20, axis=0) * np.ones(12)
    details = dataclasses.replace(details, predictions=details.references + errors)
    halves = [findings.Group("small", np.arange(40) < 20), findings.Group("large", np.arange(40) >= 20)]
    assert findings.compare_groups(details, halves) == pytest.approx(np.repeat([[0.5], [1.5]], 12, axis=1), rel=1e-6)


def test_intervals_that_know_the_error_are_seen_to():
    details = make_details(4000)
    widths, errors, coverage = findings.bin_by_width(details)
    assert len(widths) == 10
    assert (np.diff(widths) > 0).all()
    assert errors == pytest.approx(widths, rel=0.06)
    assert coverage == pytest.approx(np.full(10, 90.0), abs=1.5)
    sizes = findings.find_coverage(details, findings.group_by_size(details))
    assert sizes == pytest.approx(np.full(3, 90.0), abs=1.5)


def test_intervals_that_know_nothing_are_seen_to():
    details = make_details(4000)
    random = np.random.default_rng(3).permuted(details.half_widths, axis=0)
    errors = findings.bin_by_width(dataclasses.replace(details, half_widths=random))[1]
    assert errors == pytest.approx(np.ones(10), abs=0.08)


def test_levels_that_hold_what_they_promise_are_seen_to():
    details = make_details(4000)
    levels, shares = findings.find_calibration(details)
    assert levels[0] == 50.0
    assert (np.diff(levels) > 0.0).all()
    assert shares == pytest.approx(levels, abs=1.0)
    narrow = dataclasses.replace(details, levels=np.maximum(0.5, details.levels**0.5))
    assert (findings.find_calibration(narrow)[1][1:-1] < levels[1:-1] - 1.0).all()
    shares = findings.find_calibration(make_details(5, calibrated=False))[1]
    assert np.isnan(shares).all()


def test_the_worst_are_those_with_the_largest_share_of_their_property():
    details = make_details(50)
    predictions = details.references + 1e-3 * np.array(ERRORS)
    predictions[7, 5] += 300.0
    predictions[9, 0] -= 5.0
    predictions[9, 5] += 1.0
    references = details.references.copy()
    references[11] = np.nan
    changed = dataclasses.replace(details, predictions=predictions, references=references)
    first, second, *rest = findings.find_worst(changed, 50)
    assert [(first.row, first.column), (second.row, second.column)] == [(9, 0), (7, 5)]
    assert 11 not in {miss.row for miss in rest}
    assert len(rest) == 47


@pytest.mark.parametrize(
    ("counts", "formula"),
    [((4, 1, 0, 0, 0), "CH₄"), ((12, 10, 1, 2, 3), "C₁₀H₁₂F₃NO₂"), ((2, 0, 0, 1, 0), "H₂O"), ((3, 0, 1, 0, 0), "H₃N")],
)
def test_formulas_are_in_hills_order(counts, formula):
    assert findings.write_formula(np.array(counts)) == formula


def test_a_structure_that_cannot_be_read_is_not_drawn(capfd):
    assert charts.draw_molecule("C1CC", label="x") is None
    assert charts.draw_molecule(None, label="x") is None
    assert capfd.readouterr() == ("", "")
    assert "var(--second)" in charts.draw_molecule("CO", label="<methanol>")


# --- what stands in its way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_a_missing_package_is_told_before_the_evaluation(monkeypatch, tmp_path, evaluated, capfd, name):
    monkeypatch.setattr(report, "find_spec", lambda wanted: None if wanted == name else wanted)
    with pytest.raises(QmpropError, match=f"the report needs {name}") as raised:
        check_report(str(tmp_path / "page.html"), ())
    assert raised.value.hint == "Install it with: pip install 'qmprop[report]'."
    assert run(["eval", "--report", str(tmp_path / "page.html")]) == 1
    assert capfd.readouterr().err.startswith(f"error: the report needs {name}. Install it with:")
    assert (evaluated, list(tmp_path.iterdir())) == ([], [])


def test_a_report_needs_details(tmp_path, reports):
    for given in ([], [dataclasses.replace(reports[0], details=None)]):
        with pytest.raises(UsageError, match="a report needs evaluations with their details"):
            write_report(given, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_report_is_told(tmp_path, reports):
    with pytest.raises(OutputError) as raised:
        write_report(reports, tmp_path / "missing" / "page.html")
    assert raised.value.hint == "Name another place with --report FILE."


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch):
    """The evaluations that the command line asks for; they cost nothing."""
    calls = []

    def evaluate(**options):
        calls.append(options)
        if options["data"] == "broken.extxyz":
            raise QmpropError("broken", "Mend it.")
        if options["data"] == "qm9":
            return make_report(without_most(make_details(25)), geometry=options["geometry"])
        return make_file_report(3, whole=False)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    return calls


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ([], ["dft", "mmff", "xtb"]),
        (["--geometry", "mmff"], ["mmff"]),
        (["--geometry", "all"], ["dft", "mmff", "xtb"]),
        (["--data", "labeled.extxyz"], ["dft"]),
    ],
)
def test_eval_writes_a_report_beside_its_table(evaluated, tmp_path, capfd, options, kinds):
    path = tmp_path / "page.html"
    assert run(["eval", *options, "--report", str(path)]) == 0
    assert [call["geometry"] for call in evaluated] == kinds
    assert all(call["smiles"] for call in evaluated)
    out, err = capfd.readouterr()
    assert (" gap " in out, err) == (True, "")
    page = check_alone(path.read_text(encoding="utf-8"))
    assert " ".join(["qmprop eval", *options, "--report report.html"]) in page.text
    assert ("Shift:" in page.text) == (len(kinds) > 1)
    assert [item.name for item in tmp_path.iterdir()] == ["page.html"]


def test_without_a_report_eval_takes_dft_geometries(evaluated, capfd):
    assert run(["eval", "-f", "json"]) == 0
    assert [(call["geometry"], call["smiles"]) for call in evaluated] == [("dft", False)]
    assert json.loads(capfd.readouterr().out)["geometry"] == "dft"


def test_json_of_a_report_is_a_list_of_its_geometries(evaluated, tmp_path, capfd):
    assert run(["eval", "-f", "json", "--report", str(tmp_path / "page.html")]) == 0
    assert [item["geometry"] for item in json.loads(capfd.readouterr().out)] == ["dft", "mmff", "xtb"]


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("missing/page.html", 1, "Name another place with --report FILE."),
        (".", 1, "Name another place with --report FILE."),
        ("-", 2, "the report cannot be standard output"),
        ("labeled.extxyz", 2, "is one of the inputs"),
    ],
)
def test_a_report_that_cannot_be_written_is_told_at_once(evaluated, tmp_path, monkeypatch, capfd, path, status, said):
    monkeypatch.chdir(tmp_path)
    Path("labeled.extxyz").write_text("mine")
    assert run(["eval", "--data", "labeled.extxyz", "--report", path]) == status
    out, err = capfd.readouterr()
    assert (out, evaluated) == ("", [])
    assert said in err
    assert len(err.splitlines()) == 1
    assert Path("labeled.extxyz").read_text() == "mine"


def test_an_evaluation_that_fails_leaves_the_old_report(evaluated, tmp_path, capfd):
    path = tmp_path / "page.html"
    path.write_text("old")
    assert run(["eval", "--data", "broken.extxyz", "--report", str(path)]) == 1
    assert (path.read_text(), len(list(tmp_path.iterdir()))) == ("old", 1)


# --- in a browser -----------------------------------------------------------------------------------------------------

WIDTHS = (400, 1200)
#: Puts the page into a frame of each width and tells what sticks out of it, or has no size.
MEASURE = """
<!DOCTYPE html><html><body><script>
const page = PAGE, found = {};
window.addEventListener("error", event => { found.error = String(event.message); });
let open = WIDTHS.length;
for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.srcdoc = page;
  frame.onload = () => {
    const inside = frame.contentDocument, root = inside.documentElement;
    const name = item => item.tagName + "." + item.getAttribute("class") + " " + item.textContent.trim().slice(0, 40);
    const apart = item => item.closest(".scroll") && !item.classList.contains("scroll");
    const visible = [...inside.querySelectorAll("body *")].filter(item => !item.closest("defs, title, clipPath"));
    const outOf = (item, box) => {
      const mine = item.getBoundingClientRect();
      return mine.left < box.left - 1 || mine.right > box.right + 1;
    };
    found[width] = {
      width: root.clientWidth,
      scroll: root.scrollWidth,
      height: root.scrollHeight,
      sections: inside.querySelectorAll("section").length,
      wide: visible.filter(item => !apart(item) && outOf(item, {left: 0, right: root.clientWidth})).map(name),
      cut: [...inside.querySelectorAll("figure svg text")]
        .filter(item => outOf(item, item.closest("figure").getBoundingClientRect())).map(name),
      small: [...inside.querySelectorAll("figure svg, .molecules svg")]
        .filter(item => item.getBoundingClientRect().width < 120).length,
    };
    if (--open === 0) document.body.textContent = JSON.stringify(found);
  };
  document.body.append(frame);
}
</script></body></html>
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Runs Chromium, headless, on an HTML text; returns its standard output and standard error."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.fail("there is no Chromium to look at the report with; install it: apt-get install chromium")

    def start(text, *options):
        folder = tmp_path_factory.mktemp("browser")
        (folder / "page.html").write_text(text, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += ["--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
        command = [program, *flags, *options, (folder / "page.html").as_uri()]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        assert "CONSOLE" not in result.stderr, result.stderr
        return result.stdout

    return start


@pytest.mark.parametrize("kind", ["qm9", "one molecule"])
def test_nothing_sticks_out_on_a_phone_or_a_desk(browse, page, kind):
    text = page if kind == "qm9" else render_report([make_file_report(1, calibrated=True)])
    quoted = json.dumps(text).replace("</", "<\\/")
    harness = MEASURE.replace("PAGE", quoted, 1).replace("WIDTHS", json.dumps(WIDTHS))
    dom = browse(harness, "--virtual-time-budget=20000", "--dump-dom")
    found = json.loads(html.unescape(re.search(r"<body>(\{.*\})</body>", dom, re.DOTALL)[1]))
    assert found.keys() == {str(width) for width in WIDTHS}
    for width in WIDTHS:
        seen = found[str(width)]
        assert (seen["width"], seen["scroll"], seen["sections"]) == (width, width, len(SECTIONS))
        assert (seen["wide"], seen["cut"], seen["small"]) == ([], [], 0)
        assert seen["height"] > 1500


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_without_complaint(browse, page, tmp_path, scheme):
    options = [f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,1800"]
    browse(page, *options, f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}")
    image = imread(tmp_path / "page.png")[..., :3]
    assert image.shape == (1800, 1200, 3)
    ground = image[2, 2]
    assert (ground > 0.9).all() if scheme == "light" else (ground < 0.15).all()
    drawn = np.abs(image - ground).max(axis=2) > 0.15
    assert [bool(part.mean() > 0.005) for part in np.array_split(drawn, 6)] == [True] * 6
    assert len(np.unique((image * 255).round().astype(int).reshape(-1, 3), axis=0)) > 100


def luminance(color):
    parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colors_stand_out_on_both_grounds(page):
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    ]
    assert len(schemes) == 2
    for colors in schemes:
        for ground in ("ground", "panel"):
            for name in ("ink", "muted", "first", "second", "third"):  # WCAG's contrast for text
                light, dark = sorted((luminance(colors[name]), luminance(colors[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)
