"""The dashboard *Data*: do pairs come, and are they good?"""

from __future__ import annotations

from infra.grafana.panels import BAD, WORSE, Board, Panel, Query, Section, Variable, quantiles

MAKING = Section(
    "Making pairs",
    (
        Panel(
            "How many pairs are left to make?",
            "Trajectories of the running job still to be written. Standing still: look "
            "at the steps below, and at the job's log.",
            "short",
            (Query("sum(ray_diagonal_pairs_missing)", "missing"),),
            big=True,
            width=6,
        ),
        Panel(
            "When is it finished?",
            "Missing pairs over the job's own rate. Far too long: raise pairs.solver_workers, or "
            "add nodes to the pool that makes them.",
            "s",
            (Query("sum(ray_diagonal_pairs_missing) / (max(ray_diagonal_pairs_per_second) > 0)", "time left"),),
            big=True,
            width=6,
        ),
        Panel(
            "Which share is set aside?",
            "Samples that were quarantined over those written and set aside, of the job's "
            "pairs. Above 1 %: read the reasons below before training on the rest; the job ends at pairs.max_bad_share.",
            "percentunit",
            (Query("diagonal:quarantined:ratio", "of the pairs"),),
            limits=((0.01, WORSE), (0.05, BAD)),
            big=True,
            width=6,
        ),
        Panel(
            "Does training wait for data?",
            "Share of training's time spent waiting for its batches. Above 10 %: storage or "
            "decoding is too slow; give the job's data more CPUs or a nearer bucket.",
            "percentunit",
            (Query("max by (stage) (rate(ray_diagonal_data_wait_seconds_total{STAGES}[5m]))", "{{stage}}"),),
            limits=((0.1, WORSE), (0.3, BAD)),
            big=True,
            width=6,
        ),
    ),
)

RATES = Section(
    "Rates and reasons",
    (
        Panel(
            "How fast are pairs made?",
            "Trajectories a second: by the job's own count since it began, and written in the "
            "last minutes. A fall: a solver was lost, see the runbook under Lost node.",
            "ops",
            (
                Query("max(ray_diagonal_pairs_per_second)", "since it began"),
                Query("sum(rate(ray_diagonal_pairs_total[$__rate_interval]))", "of late"),
            ),
            width=12,
        ),
        Panel(
            "Which step takes the time?",
            "Half of all shards, and 95 %, spend so long in each step. `encode` above "
            "`solve`: "
            "more pairs.text_workers; otherwise more solvers.",
            "s",
            quantiles("ray_diagonal_pairs_shard_seconds_bucket", "le, step", "{{step}}, ", 0.5, 0.95),
            width=12,
        ),
        Panel(
            "Why are samples set aside?",
            "Quarantined samples by reason. `checksum` and unreadable files: the disk or the "
            "bucket; numbers that are not finite: the base model or a prompt. Each is named in the run's folder.",
            "short",
            (Query("sum by (stage, reason) (ray_diagonal_data_quarantined_total)", "{{stage}}: {{reason}}"),),
            width=12,
        ),
        Panel(
            "How many pairs are there?",
            "Trajectories that this job has written. It only grows; it begins at zero again "
            "with a job that goes on where another one stopped.",
            "short",
            (Query("sum(ray_diagonal_pairs_total)", "written"),),
            width=12,
        ),
    ),
)

BOARD = Board(
    "data",
    "Diagonal: data",
    "Do pairs come, and are they good?",
    (Variable("stage", "Job", "ray_diagonal_data_wait_seconds_total"),),
    (MAKING, RATES),
    {"STAGES": 'stage=~"$stage"'},
    since="now-6h",
)
