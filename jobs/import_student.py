"""Import: a public few-step student becomes a Release that can be served, without training and without Ray."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from runs.start import start

    start(__file__, __doc__)

from collections.abc import Sequence
from pathlib import Path

from diagonal.config import Config
from diagonal.config.recipes import RECIPES
from diagonal.model.import_release import import_release
from diagonal.storage.fetch import fetch, fetch_file
from diagonal.storage.remote import meaning
from jobs.runs import arguments
from jobs.runs.artefacts import lineage_of
from jobs.runs.run import say


def work(argv: Sequence[str]) -> None:
    options = arguments.import_student(argv, __doc__ or "")
    recipe = RECIPES[options.recipe]
    fast = ["serve.decoder=fast"] if options.decoder else []
    own = [f"model.path={options.base}", *recipe.settings, *fast, *options.settings]
    config = Config.from_preset(options.preset, own)
    for name in filter(None, (options.base, options.student, *options.lora, options.decoder)):
        say(meaning(name))
    student, adapters = local(options.student), [local(name) for name in options.lora]
    lora = {"lora": [lineage_of(name) for name in options.lora]} if adapters else {}
    names = {"student": lineage_of(options.student), "recipe": options.recipe, **lora}
    decoder = local(options.decoder) if options.decoder else None
    release = import_release(Path(options.out), student, config, recipe, names, adapters, decoder)
    schedule, cache = release.config.schedule, release.config.cache
    say(
        f"recipe {options.recipe}: steps {schedule.steps}, shift {schedule.shift:g}, context "
        f"{schedule.resolved_context}, window {cache.window_frames} latent frames, sink {cache.sink_frames}, positions "
        f"{recipe.positions} ({recipe.source})"
    )
    say(f"release {release.name} in {release.folder}; nobody judged it: serve it with `allow_unpromoted: true`, or")
    say(f"promote it with `python -m jobs.promote {release.folder} --reason ...`")


def local(name: str) -> Path:
    """A student's file or folder on this machine."""
    path = Path(name).expanduser()
    return path if path.is_dir() else fetch_file(name) if "." in path.name else fetch(name)
