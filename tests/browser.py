"""A page in headless Chromium, in which the script of a test runs."""

import json
import re
import shutil
import subprocess
import tempfile
import urllib.parse

import pytest

EXECUTABLE = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SCRIPT = """<head><script>(() => {
  const errors = [];
  for (const kind of ["error", "unhandledrejection", "securitypolicyviolation"])
    addEventListener(kind, (event) => errors.push(kind + ": " + (event.message || event.reason)));
  const all = (selector) => [...document.querySelectorAll(selector)];
  const texts = (selector) => all(selector).map((element) => element.textContent);
  const send = (element, event) => element.dispatchEvent(event);
  const choose = (select, value) => { select.value = value; send(select, new Event("change")); };
  const point = (selector) =>
    send(all(selector)[0], new MouseEvent("mouseover", {bubbles: true}));
  const press = (key) => send(document.activeElement,
    new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
  const run = async () => { CODE };
  addEventListener("load", async () => {
    const found = await run().catch((error) => { errors.push(String(error)); });
    document.body.textContent = encodeURIComponent(JSON.stringify({found, errors}));
  });
})()</script>"""


def run_in_page(path, code):
    """What JavaScript returns in a page that has loaded; skips the test without a browser."""
    if EXECUTABLE is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    html = path.read_text(encoding="utf-8").replace("<head>", SCRIPT.replace("CODE", code), 1)
    page = path.with_name("with_script.html")
    page.write_text(html, encoding="utf-8")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [EXECUTABLE, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={profile}", "--window-size=1200,900"]
        command += ["--virtual-time-budget=60000"]
        done = subprocess.run(
            [*command, page.as_uri()], capture_output=True, text=True, timeout=120
        )
    answer = json.loads(urllib.parse.unquote(re.search("<body>(.*)</body>", done.stdout).group(1)))
    assert not answer["errors"], answer["errors"]
    return answer["found"]
