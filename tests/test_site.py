"""The site in a browser, from the stored outputs: pages, links, images, math, search, no network."""
import json
import re
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urldefrag

import pytest
import yaml
from chromium import CHROMIUM, DRIVER, headless
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tools.site import IMPORT, ROOT, build, notebooks, staged_name, translate

pytestmark = pytest.mark.xdist_group("site")


# ---------------------------------------------------------------- without a browser

def contents() -> list[str]:
    """The pages that the table of contents names, in its order."""
    def flat(entries):
        return [page for entry in entries for page in (flat(entry["contents"]) if isinstance(entry, dict) else [entry])]

    return flat(yaml.safe_load((ROOT / "_quarto.yml").read_text("utf8"))["website"]["sidebar"]["contents"])


def test_the_table_of_contents_names_every_notebook():
    made = {"architectures.qmd", "benchmarks.qmd"}
    assert sorted({*contents()} - made) == sorted(staged_name(path).as_posix() for path in notebooks())


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


def pages() -> list[str]:
    """The pages that must open."""
    results = any((ROOT / "benchmarks" / "results").glob("*.json"))
    return [re.sub(r"\.\w+$", ".html", page) for page in contents() if results or page != "benchmarks.qmd"]


def requests(browser) -> list[str]:
    """The addresses asked for since the last call."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


@pytest.mark.slow
@pytest.mark.parametrize("page", pages())
def test_page(site, browser, page):
    folder, address = site
    browser.get(address + page)
    assert browser.find_element(By.CSS_SELECTOR, "main h1").text
    assert not [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    foreign = [url for url in requests(browser) if url.startswith(("http", "ws")) and not url.startswith(address)]
    assert not foreign, "a page must need no network"
    prose = browser.execute_script("""const main = document.querySelector('main').cloneNode(true);
        main.querySelectorAll('pre, code, math').forEach(element => element.remove()); return main.textContent""")
    assert not re.findall(r".{,20}(?:\$\$|\$[A-Za-z\\]|\\[\[(]|\\[a-z]+\{).{,20}", prose), "raw math"
    assert not browser.execute_script("""return [...document.images]
        .filter(image => !image.complete || !image.naturalWidth).map(image => image.src.slice(0, 99))""")
    for link in hrefs(browser, "a[href]"):
        if not link.startswith(address): continue
        path, anchor = urldefrag(link.removeprefix(address))
        target = folder / (path.partition("?")[0] or "index.html")
        assert target.is_file() and (not anchor or f'id="{anchor}"' in target.read_text("utf8")), f"broken link {link}"


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
    assert hrefs(browser, "#quarto-sidebar a.sidebar-link[href]") == [site[1] + page for page in pages()]


@pytest.mark.slow
def test_search_finds_temperature(site, browser):
    browser.get(site[1])
    browser.find_element(By.CSS_SELECTOR, ".smalldocs-search input, .aa-Input").send_keys("temperature")
    found = WebDriverWait(browser, 20).until(lambda _: hrefs(browser, "a.search-result, .aa-Item a"))
    assert any("compress/distill.html" in link for link in found)
