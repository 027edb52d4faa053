"""Opens every page of the built site in a headless browser, at 400 and at 1,200 pixels of width.

    python scripts/check_site.py [SITE] [--shots FOLDER]

Fails if an image of a page does not load, if a page is wider than the window, if a script or an equation fails, or if a
page asks for anything outside the site. `--shots` also writes a picture of every page. Needs chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (400, 1200)
SECONDS = 900  # a loaded machine needs minutes
# Frames have the tested widths, because a headless window cannot be narrower than 500 pixels.
DRIVER = """<!doctype html><title>check</title><script>
const pages = PAGES, widths = WIDTHS, faults = [];
async function check(page, width) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  const loaded = new Promise(done => frame.onload = done);
  frame.src = page;
  document.body.append(frame);
  await loaded;
  const view = frame.contentWindow, root = view.document.documentElement, say = text => faults.push(
    `${page} at ${width} pixels: ${text}`);
  view.onerror = text => say(`script: ${text}`);
  const images = [...view.document.images];
  for (const image of images) await image.decode().catch(() => say(`image ${image.src} does not load`));
  await new Promise(done => setTimeout(done, 50));
  if (root.scrollWidth > root.clientWidth) {
    const wide = [...view.document.querySelectorAll("article *")].filter(
      element => element.getBoundingClientRect().right > width + 1 && !element.closest("pre, table, .arithmatex"));
    say(`${root.scrollWidth} pixels wide: ${wide.slice(0, 3).map(one => one.outerHTML.slice(0, 90)).join(" ")}`);
  }
  if (!view.document.querySelector("h1")) say("no heading");
  for (const error of view.document.querySelectorAll("merror")) say(`equation: ${error.textContent}`);
  for (const entry of view.performance.getEntriesByType("resource"))
    if (new URL(entry.name).origin !== location.origin) say(`asks for ${entry.name}`);
  frame.remove();
}
onload = async () => {
  for (const page of pages) for (const width of widths) await check(page, width);
  await fetch("/checked", {method: "POST", body: JSON.stringify(faults)});
};
</script><body>"""


class Handler(SimpleHTTPRequestHandler):
    """Serves the site and the driver, and takes the driver's result."""

    pages: ClassVar[list[str]] = []
    result: ClassVar[list[str] | None] = None
    done: ClassVar[threading.Event] = threading.Event()

    def do_GET(self) -> None:
        """Sends a file of the site, or the driver."""
        if self.path != "/driver":
            return super().do_GET()
        text = DRIVER.replace("= PAGES", f"= {json.dumps(self.pages)}").replace("= WIDTHS", f"= {list(WIDTHS)}")
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(text.encode())
        return None

    def do_POST(self) -> None:
        """Takes the faults that the driver found."""
        type(self).result = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.done.set()

    def log_message(self, *args: object) -> None:
        """Prints nothing."""


def main() -> int:
    """Checks the site; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, nargs="?", default=Path("build/site"))
    parser.add_argument("--shots", type=Path)
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"check_site: no browser ({', '.join(BROWSERS)}): the pages were built, but not opened")
        return 0
    pages = sorted(f"/{path.relative_to(arguments.site).as_posix()}" for path in arguments.site.rglob("*.html"))
    Handler.pages = pages = [page for page in pages if page != "/404.html"]  # its links begin at the root of a server
    if not pages:
        print(f"check_site: {arguments.site} has no pages: run mkdocs build first", file=sys.stderr)
        return 1
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=arguments.site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += [f"--user-data-dir={profile}"]

        def start(*options: str) -> subprocess.Popen:
            return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        process = start("--remote-debugging-port=0", f"{address}/driver")
        finished = Handler.done.wait(SECONDS)
        process.terminate()
        process.wait()
        if arguments.shots:
            arguments.shots.mkdir(parents=True, exist_ok=True)
            for page in pages:
                name = page.strip("/").replace("/", "_").removesuffix(".html")
                options = f"--screenshot={arguments.shots / name}.png", "--window-size=1200,2400"
                start(*options, address + page).wait()
    faults = Handler.result if finished else [f"the browser did not finish within {SECONDS} seconds"]
    for fault in faults or []:
        print("check_site:", fault, file=sys.stderr)
    if not faults:
        print(f"check_site: {len(pages)} pages at {' and '.join(map(str, WIDTHS))} pixels: no fault")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
