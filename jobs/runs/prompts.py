"""A run's prompts: prepared once from the configured files, then kept in its folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import chain

from diagonal.config import Config
from diagonal.data.embedded import embedded_world
from diagonal.data.extension import Extender
from diagonal.data.prompt_files import SetAside, read_prompts
from diagonal.data.prompt_set import MANIFEST, PromptSet, prepare, read_prompt_manifest
from diagonal.data.prompts import is_held_out, prompt_id
from diagonal.errors import require
from diagonal.storage import Folder
from jobs.runs.run import Run, say

EMBEDDED = "the embedded world"


def pair_prompts(run: Run) -> PromptSet:
    """What the pairs are of: the training prompts of pairs.prompts, or the embedded world's training captions."""
    return PromptSet(pair_prompts_folder(run))


def training_prompts(run: Run) -> PromptSet:
    """What the distillation trains on: the training prompts of distill.prompts, or the pairs'."""
    uri = run.config.distill.prompts
    if not uri or uri == run.config.pairs.prompts:
        return pair_prompts(run)
    return PromptSet(_prepared(run, run.folder / "prompts" / "distill", uri))


def pair_prompts_folder(run: Run) -> Folder:
    """The folder of `pair_prompts`, prepared if it is not yet."""
    return _prepared(run, run.folder / "prompts", run.config.pairs.prompts)


def _prepared(run: Run, folder: Folder, uri: str) -> Folder:
    if folder.has(MANIFEST):
        return folder
    config = run.config
    require(bool(uri) or config.is_embedded, "pairs.prompts", uri, "a prompt file (embedded presets have their own)")
    aside = SetAside(config.prompts.max_bad_share)
    if uri:
        prompts, source = read_prompts(uri, config.train.storage_patience_s, config.prompts.field, aside), uri
        held_out: Callable[[str], bool] = partial(is_held_out, share=config.prompts.held_out_share)
    else:
        require(
            not config.prompts.extend_url,
            "prompts.extend_url",
            config.prompts.extend_url,
            "'' for the embedded world, whose oracle reads the captions; or a file as pairs.prompts",
        )
        captions = embedded_world(config).captions
        kept = {prompt_id(caption) for caption in captions(True)}
        prompts, source = chain(captions(False), captions(True)), EMBEDDED
        held_out = kept.__contains__
    extender = partial(_extender, config, folder / "extended") if config.prompts.extend_url else None
    found = prepare(folder, source, prompts, held_out, extender)
    say(
        f"prompts: {found['training']} for training and {found['held_out']} held out, of {found['read']} in {source} "
        f"({found['empty']} empty, {found['duplicates']} repeated)"
    )
    if aside.count:
        say(f"prompts: {aside.count} rows without one are left out; the first: {'; '.join(aside.first)}")
    if found["extension"]:
        say(f"prompts: {found['extension']['extended']} extended, {found['extension']['failed']} kept as they are")
    return folder


def _extender(config: Config, cache: Folder, prompts: int) -> Extender:
    say(f"prompts: {prompts} are extended by {config.prompts.extend_model} at {config.prompts.extend_url}")
    most_failed = math.floor(config.pairs.max_bad_share * prompts + 1e-9)
    return Extender(config.prompts, config.seed, cache, most_failed)


def prompts_sha256(folder: Folder) -> str:
    """The sha256 of a prepared folder's training prompts."""
    return str(read_prompt_manifest(folder)["sha256"]["train.parquet"])
