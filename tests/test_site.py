"""The site in a browser, from the stored outputs: each page at a desk, in the dark, on a phone, on paper."""
import configparser
import json
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urldefrag

import pytest
import yaml
from chromium import CHROMIUM, DRIVER, headless
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tools import bench, pages
from tools.charts import number, tradeoff
from tools.run import notebooks
from tools.site import IMPORT, ROOT, build, figure, looks, staged, translate, with_terms

pytestmark = pytest.mark.xdist_group("site")


# ---------------------------------------------------------------- without a browser

def listed() -> list[str]:
    """The pages that the table of contents names, in its order."""
    return pages.flat(yaml.safe_load((ROOT / "_quarto.yml").read_text("utf8"))["website"]["sidebar"]["contents"])


def test_the_table_of_contents_names_every_notebook():
    made = {"architectures.qmd", "benchmarks.qmd"}
    assert sorted({*listed()} - made) == sorted(pages.staged_name(path).as_posix() for path in notebooks())


@pytest.mark.parametrize("text", [
    "`$x$` and ``a ` $x$``", "```python\ncost = '$5$'\n```", "  ~~~\n  $$x$$\n  ~~~",
    r"costs \$5 or \$6", "costs $5, or $6", "between $5 and $10",
    "[page](../start/quickstart.ipynb)", "![figure](20_figure.png)", "`](20_distill.ipynb)`",
])
def test_what_is_not_math_stays(text):
    assert translate(text) == text


@pytest.mark.parametrize("tex", [
    r"\begin{aligned} a &= b \\ c &= d \end{aligned} \tag{2}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}",
    r"\lVert \hat{W} \rVert_2 \le \text{error}", r"\mathbb{R}^{B \times C}", r"\operatorname{round}(x / s) | y",
    "a\n+ b",
])
def test_math_becomes_mathml(tex):
    for text in f"$${tex}$$", f"$${tex}$$ and $x_i$, `$y$`":
        page = translate(text)
        assert "<math" in page and "$" not in page.replace("`$y$`", "") and "\\" not in page
    assert "|" not in page, "a table cell would end there"
    assert ("(2)" in page) == ("tag" in tex)


def test_unknown_math_is_an_error():
    with pytest.raises(Exception, match="nosuchcommand"): translate(r"$\nosuchcommand$")


def test_links_lose_their_number():
    assert translate("[a](../compress/20_distill.ipynb#idea)") == "[a](../compress/distill.ipynb#idea)"
    assert translate("[b](01_quickstart.ipynb)") == "[b](quickstart.ipynb)"


def test_the_first_use_of_a_term_leads_to_the_glossary():
    page, seen = Path("compress/distill.qmd"), set()
    def linked(text): return with_terms(text, seen, page)
    to = 'class="term" href="../explain/transformer.html#term'
    assert linked("A Student has\ntokens.") == f'A <a {to}-student">Student</a> has\n<a {to}-token">tokens</a>.'
    assert linked("The student's tokens") == "The student's tokens", "once on a page"
    for text in ("## Sparsity", "`sparsity`", "$sparsity$", "[sparsity](x.ipynb)", "```\nsparsity\n```", "non-sparsity",
                 "| sparsity |", '<a id="sparsity">', "::: {title=\"sparsity\"}", "* A. Author. *Sparsity.* 2020."):
        assert linked(text) == text
    assert f"{to}-kv-cache" in linked("its KV\ncache") and "KV\ncache</a>" not in linked("its KV cache")


def test_equations_are_linked_where_they_are():
    text = "Equation (1), equations (2) and (3), see (2); `equation (1)`; equation (9)."
    assert translate(text, frozenset("123")) == (
        "[Equation (1)](#equation-1), [equations (2)](#equation-2) and [(3)](#equation-3), see (2); `equation (1)`; "
        "equation (9).")


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAYAAAD0In+KAAAAD0lEQVR4nGNkYGD4D8QMAAQOAQFMl7jkAAAAAElFTkSuQmCC"  # 2 × 1


def test_a_figure_has_its_caption_its_alt_text_and_its_size():
    assert looks('#| export\n#| fig-cap: "A: b"\n#| fig-alt:\n#|   - "C\n#|     d"\n#| code-fold: true\nx = 1') == {
        "fig-cap": "A: b", "fig-alt": ["C d"], "code-fold": True}
    text = figure(PNG, "A & b", 'The "c"')
    assert 'width="2" height="1"' in text and "A &amp; b</figcaption>" in text and "The &quot;c&quot;" in text
    assert 'width="1" height="0"' in figure(PNG, "", "", width=1) and "figcaption" not in figure(PNG, "", "")


def test_a_published_repository_is_linked(monkeypatch):
    notation = next(path for path in notebooks() if path.name == "72_notation.ipynb")
    def links(): return re.findall(r'href="(https:[^"]+)"', staged(notation).cells[1].source)

    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    monkeypatch.setitem(pages.SETTINGS["DEFAULT"], "git_url", "")
    assert links() == []
    monkeypatch.setenv("GITHUB_REPOSITORY", "shop/ecomopt")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    place = "shop/ecomopt/blob/main/nbs/explain/72_notation.ipynb"
    assert links() == [f"https://github.com/{place}", f"https://colab.research.google.com/github/{place}"]


@pytest.mark.parametrize("value, text", [
    (10.0023, "10.0"), (1, "1.00"), (123.4, "123"), (1350.9, "1,350"), (0.00035, "0.00035"), (0.9026, "0.903"),
])
def test_three_significant_digits(value, text):
    assert number(value) == text


def test_values_of_a_table():
    values = None, 1529, 0.90251, "0.00665 to 0.07631", "float32", "3.1-rc 2.13.0"
    texts = "", "1,529", "0.903", "0.00665 to 0.0763", "float32", "3.1-rc 2.13.0"
    assert tuple(map(pages.shown, values)) == texts


def test_a_benchmark_says_who_wins_and_survives_what_it_does_not_know(tmp_path):
    rows = [{"model": "teacher", "× throughput": 1.0, "retained": 1.0, "MB": 91.6},
            {"model": "ours <int8>", "× throughput": 11.7476, "retained": 0.9707, "MB": 5.117},
            {"model": "words", "× throughput": None, "retained": None, "MB": None}]
    text = pages.answer(pages.QUESTIONS["compress"], rows)
    assert text.startswith("**ours <int8>: 11.7** times the throughput of the float32 teacher, "
                           "ahead of teacher with 1.00. It keeps 97.1% of the teacher's accuracy and has 5.12 MB.")
    assert "ours &lt;int8&gt;" in text and text.count("<rect") == 2
    (tmp_path / "new.json").write_text(json.dumps({"name": "new", "table": [{"what": "x", "n": None}], "date": "2026"}))
    made = pages.benchmarks([tmp_path / "new.json"])
    assert "## New {#new}" in made and "NaN" not in made and "None" not in made


def test_a_benchmark_whose_script_has_changed_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "BENCHMARKS", tmp_path)
    (tmp_path / "new.py").write_text("1")
    result = {"name": "new", "table": [{"what": "x", "n": 1}], "script": bench.script("new")}
    (tmp_path / "new.json").write_text(json.dumps(result))
    assert "has changed" not in pages.benchmarks([tmp_path / "new.json"])
    (tmp_path / "new.py").write_text("2")
    assert "The script has changed" in pages.benchmarks([tmp_path / "new.json"])


def test_the_trade_off_names_every_model():
    svg = tradeoff([dict(name=f"model {n} & co", accuracy=0.9 - n / 500, latency=2.0**n, bytes=10**n, ours=n == 0)
                    for n in range(6)])
    assert svg.count("<circle") == 6 and svg.count("&amp; co</text>") == 6 and "nan" not in svg.lower()


@pytest.fixture(scope="module")
def made():
    """The pages that no notebook makes."""
    return pages.made()


def test_every_public_name_is_in_the_reference(made):
    for name in pages.modules():
        page = made[pages.api_page(name).as_posix()]
        missing = [public for public in pages.imported(name).__all__ if f"{{#{public}}}" not in page]
        assert not missing, f"{name} lacks {missing}"
    assert "{#Task.from_csv}" in made["api/core/data.qmd"]


def test_a_union_of_types_is_one_cell(made):
    page = made["api/optimize/optimize.qmd"]
    assert r"| budget | float \| str | 20min | for the search, without fine-tuning the teacher |" in page
    for name, text in made.items():
        for table in re.findall(r"(?:^\|.*\n?)+", text, re.M) if name.startswith("api/") else ():
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, f"{name}: {table}"
        assert " object at 0x" not in text, name


def test_the_reference_has_every_command_and_its_options(made):
    page = made["api/optimize/cli.qmd"]
    for words in ("assets", "measure", "distill", "quantize", "recipe run", "optimize", "predict", "report", "serve"):
        assert f"### ecomopt {words}\n" in page and f"Usage: ecomopt {words} " in page
    assert "| as_json | bool | False | instead of the table |" in page
    assert "--max-drop" in page and "`ecomopt assets --fetch minilm --fetch reviews`" in page


def test_the_reference_leads_to_the_line(made):
    page = made["api/compress/distill.qmd"]
    line = int(re.search(r"## distill \{#distill\}.*?#line-(\d+)", page, re.S)[1])
    assert pages.source_file("compress.distill").read_text("utf8").splitlines()[line - 1].startswith("def distill(")


def test_the_citation_is_of_this_version():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", "utf8")
    assert said["version"] == settings["DEFAULT"]["version"] and said["title"] == settings["DEFAULT"]["lib_name"]
    assert said["cff-version"] and said["message"] and said["authors"]


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site and the address it is served from."""
    if not (CHROMIUM and DRIVER): pytest.skip("needs chromium and chromedriver on the PATH")
    folder = tmp_path_factory.mktemp("site")
    build(folder / "staged", folder / "site")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder / "site"))
    Thread(target=server.serve_forever, daemon=True).start()
    yield folder / "site", f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser(site):
    """Chromium with the width of a desk."""
    with headless("1280,1600") as driver:
        driver.set_page_load_timeout(60)
        yield driver


def html() -> list[str]:
    """The pages that must open."""
    results = any((ROOT / "benchmarks" / "results").glob("*.json"))
    sources = [page for page in listed() if results or page != "benchmarks.qmd"] + ["404.qmd", "api/index.qmd"]
    sources += [pages.api_page(name).as_posix() for name in pages.modules()]
    return [re.sub(r"\.\w+$", ".html", page) for page in sources]


def requests(browser) -> list[str]:
    """The addresses asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


def seen(browser, width: int = 1280, scheme: str = "light", media: str = "") -> None:
    """The page at another width, in the dark, or on paper."""
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    dark = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": dark})
    pause = 120 if scheme == "dark" else 30  # the scripts of the page follow in a moment
    browser.execute_async_script(f"setTimeout(arguments[0], {pause})")


LIBRARY = (Path(__file__).parent / "page.js").read_text("utf8")


@pytest.mark.slow
@pytest.mark.parametrize("page", html())
def test_page(site, browser, page):
    folder, address = site
    seen(browser)
    browser.get(address + page)
    found = {"console": [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]}
    found["network"] = [url for url in requests(browser) if re.match("http|ws", url) and not url.startswith(address)]
    found["size"] = [size for size in [(folder / page).stat().st_size] if size > 3_000_000]
    browser.execute_script(LIBRARY)
    for check in ("images", "figures", "headings", "rawMath", "contrast", "active"):
        found[check] = browser.execute_script(f"return page.{check}()")
    found["links"] = broken(folder, address, hrefs(browser, "a[href]"))
    seen(browser, scheme="dark")
    found["contrast in the dark"] = browser.execute_script("return page.contrast()")
    seen(browser, width=390)
    found["phone"] = browser.execute_script("return page.wide()")
    seen(browser, width=718, media="print")
    found["paper"] = browser.execute_script("return page.wide(true)")
    said = [f"{check}: {one}" for check, what in found.items() for one in what]
    assert not said, "\n" + "\n".join(said)


@pytest.mark.slow
def test_the_checks_find_what_is_wrong(site, browser):
    seen(browser)
    browser.get(site[1] + "core/data.html")
    browser.execute_script(LIBRARY)
    browser.execute_script("""const main = document.querySelector('main');
        main.insertAdjacentHTML('beforeend', `<p style="color: #999">faint
        $x$</p><h6>deep</h6><figure></figure><img src="data:,"><div style="width: 2000px">wide</div>`);
        document.querySelectorAll('.sidebar-link.active').forEach(link => link.classList.remove('active'))""")
    for check in ("images", "figures", "headings", "rawMath", "contrast", "active", "wide"):
        assert browser.execute_script(f"return page.{check}()"), f"{check} finds nothing"
    browser.get_log("browser")


def broken(folder: Path, address: str, links: list[str]) -> list[str]:
    """Links to files or anchors that the site does not have."""
    found = []
    for link in {link for link in links if link.startswith(address)}:
        path, anchor = urldefrag(link.removeprefix(address))
        target = folder / (path.partition("?")[0] or "index.html")
        if not target.is_file() or anchor and f'id="{anchor}"' not in target.read_text("utf8"): found.append(link)
    return found


def hrefs(browser, selector: str) -> list[str]:
    """The absolute addresses of links."""
    return browser.execute_script(f"return [...document.querySelectorAll('{selector}')].map(link => link.href)")


@pytest.mark.slow
def test_the_theme_is_whole(site, browser):
    """Half of an @import that was left in front of it once took the theme's first rule, and code could not be read."""
    browser.get(site[1] + "index.html")
    colours = "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
    background, text = browser.execute_script(colours)
    assert background not in ("rgba(0, 0, 0, 0)", text)


@pytest.mark.parametrize("address", ["url(https://a/b?c:300;400&d)", "'https://a/b;c'", 'url("https://a")'])
def test_fonts_of_the_network_are_taken_out_whole(address):
    assert IMPORT.sub("", f"/**/@import {address};:root{{}}") == "/**/:root{}"


@pytest.mark.slow
def test_the_sidebar_shows_every_page(site, browser):
    browser.get(site[1])
    shown = hrefs(browser, "#quarto-sidebar a.sidebar-link[href]")
    assert sorted({*shown}) == sorted(site[1] + page for page in html() if page != "404.html")


@pytest.mark.slow
def test_the_sidebar_of_a_phone_scrolls(site, browser):
    seen(browser, width=390)
    browser.get(site[1] + "compress/prune.html")
    browser.find_element(By.CSS_SELECTOR, ".quarto-btn-toggle").click()
    height, inside, flow = browser.execute_script("""const bar = document.getElementById('quarto-sidebar');
        bar.querySelectorAll('ul.collapse').forEach(part => part.classList.add('show'));
        const scrolls = bar.scrollHeight > bar.clientHeight;
        return [bar.getBoundingClientRect().bottom, scrolls, getComputedStyle(bar).overflowY]""")
    assert height <= 844 and inside and flow in ("auto", "scroll")
    seen(browser)


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["/", Keys.TAB])
def test_the_keyboard_reaches_the_search_which_finds_temperature(site, browser, keys):
    seen(browser)
    browser.get(site[1])
    inside = "return document.activeElement.matches('input, .aa-DetachedSearchButton')"
    for _ in range(10):
        ActionChains(browser).send_keys(keys).perform()
        if browser.execute_script(inside): break
    else: pytest.fail("the search is not reached")
    ActionChains(browser).send_keys("temperature").perform()
    found = WebDriverWait(browser, 20).until(lambda _: hrefs(browser, "a.search-result, .aa-Item a"))
    assert any("compress/distill.html" in link for link in found)


@pytest.mark.slow
def test_a_link_to_a_line_of_the_source_opens_it(site, browser):
    seen(browser)
    browser.get(site[1] + "api/compress/distill.html")
    browser.execute_script("[...document.querySelectorAll('a')].findLast(a => a.hash.startsWith('#line-')).click()")
    line = WebDriverWait(browser, 10).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "span:target"))[0]
    assert line.is_displayed() and line.text.startswith("def distill(")


@pytest.mark.slow
def test_a_reader_can_take_the_notebook_and_a_language_model_the_list(site, browser):
    folder, address = site
    browser.get(address + "compress/distill.html")
    link, = hrefs(browser, "a[download]")
    taken = (folder / link.removeprefix(address)).read_bytes()
    assert taken == (ROOT / "nbs" / "compress" / "20_distill.ipynb").read_bytes()
    listed = re.findall(r"\]\((.+?)\): .", (folder / "llms.txt").read_text("utf8"))
    assert listed and all((folder / name).is_file() for name in listed)
    head = browser.execute_script("return [...document.querySelectorAll('meta[property^=og]')].map(m => m.content)")
    assert "Knowledge distillation" in " ".join(head)
