"""The live page in a real browser, on a real controller over a real store."""

import re
import shutil
import time

import pytest
from controller_process import controlled
from page_scene import write_scene

from autopoiesis.orchestrator.control_access import read_token

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (extra dev)"
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
PATIENCE_MS = 30_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
expect = playwright.expect


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def instance(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    (folder / ".autopoiesis").mkdir()
    write_scene(folder / ".autopoiesis" / "telemetry.duckdb", time.time())
    with controlled(folder, window_s=2.0) as running:
        yield running


@pytest.fixture
def open_page(browser, instance):
    """Open the page in a fresh context; whatever it complains of fails the test."""
    complaints, contexts = [], []

    def opened(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on(
            "console", lambda said: complaints.append(said.text) if said.type != "log" else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(instance.settings.control_url)
        expect(page.locator("#connection")).to_have_text("live", timeout=PATIENCE_MS)
        expect(page.locator("#allocation .area").first).to_be_attached(timeout=PATIENCE_MS)
        return page

    opened.complaints = complaints
    yield opened
    for context in contexts:
        context.close()
    assert [] == complaints


PANELS = {
    "#figures .figure": "utility",
    "#allocation .legend": "gen-kv-aware",
    "#utility .legend": "utility",
    "#regret .legend": "regret",
    "#rate .legend": "within the objective",
    "#tokens .legend": "tokens/s",
    "#ttft svg": "objective 1.00 s",
    "#tpot svg": "objective 100 ms",
    "#fleet .cell": "of the traffic",
    "#arms tbody": "least-requests",
    "#family": "gen-kv-wary",
    "#synthesis": "1 promoted",
    "#twin": "mean TTFT",
    "#alarms": "context",
    "#events": "the workload has changed: input tokens",
}


def test_every_panel_shows_what_the_store_holds(open_page):
    page = open_page()

    for panel, holds in PANELS.items():
        expect(page.locator(panel).filter(has_text=holds).first).to_be_visible()


def test_every_chart_draws_a_mark_per_series_and_the_interval_of_regret(open_page):
    page = open_page()

    for chart in ("utility", "regret", "rate", "tokens", "ttft", "tpot", "twin"):
        expect(page.locator(f"#{chart} polyline").first).to_be_attached()
    expect(page.locator("#regret .band").first).to_be_attached()
    expect(page.locator("#utility .mark")).to_have_count(2)


def test_a_window_that_closes_appears_by_itself(open_page):
    page = open_page()
    before = newest_window(page)

    page.wait_for_function(
        "before => Number(document.querySelector('#instance').textContent.match(/window (\\d+)/)[1]) > before + 1",
        arg=before,
    )


def newest_window(page):
    shown = page.locator("#instance")
    expect(shown).to_contain_text(
        re.compile(r"window \d+"), timeout=PATIENCE_MS
    )  # the page is live before its data
    return int(shown.text_content().split()[1])


def test_arrow_keys_read_single_windows(open_page):
    page = open_page()
    page.locator("#regret .chart").focus()
    page.keyboard.press("Home")
    tip = page.locator("#regret .tip")

    expect(tip).to_contain_text("window 0,")
    expect(tip).to_contain_text("0.13 (0.10 to 0.17)")
    expect(tip).to_have_attribute("aria-live", "polite")
    page.keyboard.press("ArrowRight")
    expect(tip).to_contain_text("window 1,")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_pointer_reads_the_shares_of_a_window(open_page):
    page = open_page()
    chart = page.locator("#allocation .chart")
    chart.hover(position={"x": 60, "y": 80})

    expect(page.locator("#allocation .tip")).to_contain_text("prefix-affinity")


def test_an_arm_is_set_beside_its_parent_with_its_races(open_page):
    page = open_page()
    page.get_by_role("button", name="gen-kv-wary").click()
    shown = page.locator("#diff")

    expect(shown.locator("td.gone")).to_contain_text("replica.kv_usage")
    expect(shown.locator("td.new")).to_contain_text("2.0 * replica.kv_usage")
    expect(shown).to_contain_text("gain +0.012 (0.004 to 0.021)")
    shown.get_by_label("Beside:").select_option(label="round-robin")
    expect(shown.locator("thead")).to_contain_text("round-robin")


def test_a_synthesis_cycle_opens_with_brief_answers_and_verdicts(open_page):
    page = open_page()
    page.locator("#synthesis summary").first.click()
    shown = page.locator("#synthesis .cycle").first

    expect(shown).to_contain_text("drift of the context")
    expect(shown).to_contain_text("gain -0.200 (-0.250 to -0.150)")
    expect(shown).to_contain_text("line 1: not an expression")
    shown.locator("summary").filter(has_text="verify").click()
    expect(shown.locator("pre").filter(has_text="def score(:")).to_be_visible()


def test_the_page_survives_a_server_that_goes_away(browser, instance):
    context = browser.new_context()
    page = context.new_page()
    page.goto(instance.settings.control_url)
    pill = page.locator("#connection")
    expect(pill).to_have_text("live", timeout=PATIENCE_MS)
    before = newest_window(page)
    instance.kill()
    try:
        expect(pill).to_have_text("server away, trying again", timeout=PATIENCE_MS)
        expect(page.locator("#allocation .area").first).to_be_attached()
    finally:
        instance.start()

    expect(pill).to_have_text("live", timeout=PATIENCE_MS)
    page.wait_for_function(
        "before => Number(document.querySelector('#instance').textContent.match(/window (\\d+)/)[1]) > before",
        arg=before,
    )
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_horizontal_scroll(open_page, scheme):
    page = open_page(
        viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True, is_mobile=True
    )
    page.get_by_role("button", name="gen-kv-wary").click()
    page.locator("#synthesis summary").first.click()
    expect(page.locator("#diff table")).to_be_visible()

    assert 360 == page.evaluate("document.documentElement.scrollWidth")
    small = page.evaluate(
        "[...document.querySelectorAll('button:not(.node), select, input')].filter(e => e.offsetParent"
        " && e.offsetHeight < 40).length"
    )
    assert 0 == small


CONTRASTS = """() => {
  const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = parts(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0.5) return c.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let n = walker.nextNode(); n; n = walker.nextNode()) {
    const e = n.parentElement;
    if (!n.textContent.trim() || !e.checkVisibility() || e.closest('.top, noscript, script')) continue;
    const style = getComputedStyle(e);
    const ink = light(parts(e instanceof SVGElement ? style.fill : style.color));
    const paper = light(ground(e));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5) found.push([n.textContent.trim().slice(0, 40), Number(ratio.toFixed(2))]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(open_page, scheme):
    page = open_page(color_scheme=scheme)
    page.get_by_role("button", name="gen-kv-wary").click()
    page.locator("#synthesis summary").first.click()
    expect(page.locator("#diff table")).to_be_visible()

    assert [] == page.evaluate(CONTRASTS)


def test_theme_button_goes_round_and_is_remembered(open_page):
    page = open_page(color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    button = page.get_by_role("button", name="Colour theme")
    button.click()
    button.click()
    dark = page.evaluate(ground)
    page.reload()

    assert light != dark
    assert dark == page.evaluate(ground)
    expect(button).to_have_attribute("aria-label", "Colour theme: dark")


def test_nothing_moves_for_who_asked_for_that(open_page):
    page = open_page(reduced_motion="reduce")
    durations = page.evaluate(
        "[...document.querySelectorAll('*')].map(e => getComputedStyle(e).transitionDuration)"
    )

    assert {"0s"} == set(durations)


def test_everything_that_can_be_used_has_a_name_and_can_be_reached(open_page):
    page = open_page()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, select, input, summary, [tabindex="0"]')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length
            || document.getElementById(e.getAttribute('aria-labelledby')))).map(e => e.outerHTML)"""
    )
    doubled = page.evaluate(
        "[...document.querySelectorAll('[id]')].map(e => e.id).filter((id, i, all) => all.indexOf(id) !== i)"
    )
    page.locator("body").press("Tab")

    assert [] == nameless
    assert [] == doubled
    assert "Skip to the content" == page.evaluate("document.activeElement.textContent")


def test_the_page_asks_nobody_but_its_server(open_page, browser, instance):
    context = browser.new_context()
    page = context.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(instance.settings.control_url)
    expect(page.locator("#connection")).to_have_text("live", timeout=PATIENCE_MS)
    context.close()

    assert asked
    assert [] == [url for url in asked if not url.startswith(instance.settings.control_url)]


@pytest.fixture
def operator(open_page, instance):
    """A page with the token given, and a way to order something for an arm."""
    page = open_page()
    panel = page.locator("#controls")
    panel.get_by_label("Token").fill(read_token(instance.settings.data_dir))

    def give(order, arm):
        option = panel.get_by_label("Arm").locator("option").filter(has_text=f"{arm} (")
        panel.get_by_label("Arm").select_option(value=option.get_attribute("value"))
        command(order)

    def command(order):
        panel.get_by_label("Why").fill("tried from the page")
        panel.get_by_role("button", name=order, exact=True).click()

    page.give, page.command = give, command
    return page


def row(page, arm):
    return page.locator("#arms tr").filter(has=page.get_by_role("rowheader", name=arm))


def test_orders_need_the_token(open_page):
    panel = open_page().locator("#controls")
    panel.get_by_role("button", name="Pin", exact=True).click()

    expect(panel.get_by_role("status")).to_contain_text("Give the token first")


def test_beyond_loopback_the_page_asks_for_the_token_before_it_shows_anything(
    browser, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("open")
    with controlled(folder, window_s=2.0, control_host="0.0.0.0") as running:
        context = browser.new_context()
        page = context.new_page()
        page.goto(running.settings.control_url)
        expect(page.locator("#connection")).to_have_text("a token is needed", timeout=PATIENCE_MS)
        page.get_by_role("textbox", name="Token").fill(read_token(running.settings.data_dir))
        page.get_by_role("textbox", name="Token").press("Enter")

        expect(page.locator("#connection")).to_have_text("live", timeout=PATIENCE_MS)
        expect(page.get_by_role("button", name="Retire", exact=True)).to_be_visible()
        context.close()


def test_a_wrong_token_is_refused_in_a_sentence(browser, instance):
    context = browser.new_context()
    page = context.new_page()
    page.goto(instance.settings.control_url)
    panel = page.locator("#controls")
    panel.get_by_label("Token").fill("wrong")
    panel.get_by_role("button", name="Pin", exact=True).click()

    expect(panel.get_by_role("status")).to_contain_text("control-token", timeout=PATIENCE_MS)
    context.close()


def test_pin_and_unpin_show_at_once_and_are_kept(operator, instance):
    operator.give("Pin", "gen-kv-aware")
    expect(row(operator, "gen-kv-aware").get_by_title("pinned")).to_be_visible()
    kept = instance.rows("select pinned from arms where name = 'gen-kv-aware'")
    operator.give("Unpin", "gen-kv-aware")
    expect(row(operator, "gen-kv-aware").get_by_title("pinned")).to_have_count(0)

    assert [[True]] == kept
    expect(operator.locator("#events")).to_contain_text("tried from the page")


def test_quarantine_promote_and_retire_take_an_arm_through_its_states(operator):
    for order, state in (
        ("Quarantine", "quarantined"),
        ("Promote", "canary"),
        ("Retire", "retired"),
    ):
        operator.give(order, "gen-kv-wary")
        expect(operator.locator("#controls").get_by_role("status")).to_have_text(
            f"Done: gen-kv-wary is {state}."
        )
        expect(operator.locator(f"#family .node.{state}")).to_have_text("gen-kv-wary")

    operator.get_by_role("button", name="that do not serve").click()
    expect(row(operator, "gen-kv-wary").locator("td").nth(1)).to_have_text("retired")


@pytest.mark.parametrize(
    ("order", "says", "back", "column"),
    [
        ("Freeze", "frozen", "Unfreeze", "frozen"),
        ("Dry run", "dry run", "End dry run", "dry_run"),
        ("Human only", "human arms only", "End human only", "human_only"),
        ("Roll back", "frozen", "Release", "frozen"),
    ],
)
def test_guard_rails_show_at_once_are_kept_and_are_lifted(
    operator, instance, order, says, back, column
):
    rails = operator.locator("#rails")
    expect(rails).to_be_hidden()
    kept = (
        f"select {column}, reason like '%the live page%tried from the page' "
        "from guard_rails order by at_s desc limit 1"
    )
    operator.command(order)
    expect(operator.locator("#controls").get_by_role("status")).to_contain_text(
        f"In force: {says}."
    )
    expect(rails).to_have_text(says)
    expect(operator.locator("#in-force")).to_have_text(f"In force: {says}.")
    assert [[True, True]] == instance.rows(kept)
    operator.command(back)
    expect(rails).to_be_hidden()
    assert [[False, True]] == instance.rows(kept)


def test_human_only_takes_synthesized_arms_out_of_the_cells(operator):
    synthesized = operator.locator("#fleet .tag").filter(has_text="genetic")
    operator.give("All traffic", "gen-kv-aware")
    expect(synthesized.first).to_be_visible()
    operator.command("Human only")
    expect(synthesized).to_have_count(0)
    operator.command("Release")


def test_one_arm_gets_all_traffic_until_that_is_released(operator):
    operator.give("All traffic", "round-robin")
    expect(operator.locator("#rails")).to_have_text("everything to round-robin")
    cells = operator.locator("#fleet .cell h3")
    expect(cells.filter(has_not_text="round-robin")).to_have_count(0)
    expect(cells.first).to_contain_text("round-robin")
    operator.command("Release")
    expect(operator.locator("#rails")).to_be_hidden()


def test_what_cannot_be_done_is_said(operator, open_page):
    operator.give("Promote", "round-robin")
    expect(operator.locator("#controls .answer.trouble")).to_contain_text("live already")

    assert 1 == len(open_page.complaints)
    assert "409" in open_page.complaints.pop()
