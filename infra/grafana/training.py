"""The dashboard *Training*: is the model still learning, and how fast?"""

from __future__ import annotations

from infra.grafana.panels import BAD, WORSE, Board, Panel, Query, Section, Variable, quantiles

PROGRESS = Section(
    "Progress",
    (
        Panel(
            "How far is it?",
            "The newest update over the last one planned, by job. Standing still while workers run: see "
            "the runbook under Training stands still.",
            "percentunit",
            (
                Query(
                    "max by (stage) (ray_diagonal_training_update{STAGES} / ray_diagonal_training_updates_planned{STAGES})",
                    "{{stage}}",
                ),
            ),
            big=True,
            width=6,
            top=1,
        ),
        Panel(
            "What is trained, and by how many?",
            "Phase (0 initialisation from pairs, 1 uniform steps, 2 the diagonal) and "
            "workers. Fewer workers than asked for: a node was lost, and the run goes on smaller; check its batch.",
            "short",
            (
                Query("max by (stage) (ray_diagonal_training_stage{STAGES})", "{{stage}}: phase"),
                Query("max by (stage) (ray_diagonal_training_workers{STAGES})", "{{stage}}: workers"),
            ),
            big=True,
            width=6,
        ),
        Panel(
            "How old is the newest checkpoint?",
            "In intervals between checkpoints: above 2 a lost node costs more than it "
            "should. Look for storage that is slow or full in the job's log.",
            "none",
            (Query("max by (stage) (diagonal:checkpoint_age:intervals{STAGES})", "{{stage}}"),),
            limits=((1.5, WORSE), (2.0, BAD)),
            big=True,
            width=6,
        ),
        Panel(
            "Did anything go wrong?",
            "Updates skipped for a NaN, restarts of workers, and checkpoints that were refused or "
            "left out, since the job began. NaNs in a row end the run: lower the learning rate or look at the data; "
            "refused checkpoints: check the storage.",
            "short",
            (
                Query("sum(ray_diagonal_nonfinite_updates_total{STAGES})", "skipped"),
                Query("sum(ray_diagonal_restarts_total{STAGES})", "restarts"),
                Query("sum(ray_diagonal_checkpoints_refused_total{STAGES})", "refused"),
                Query("sum(ray_diagonal_checkpoints_skipped_total{STAGES})", "left out"),
            ),
            big=True,
            width=6,
        ),
    ),
)

LEARNING = Section(
    "Learning",
    (
        Panel(
            "Do the losses behave?",
            "Newest value of each term. The critic's should fall and settle; dmd and motion move "
            "around a level. A jump that stays: go back to the checkpoint before it, and judge by the samples.",
            "none",
            (Query("max by (stage, loss) (ray_diagonal_loss{STAGES})", "{{stage}}: {{loss}}"),),
            width=12,
        ),
        Panel(
            "Are the gradients in bounds?",
            "Norms before clipping. Steadily far above distill.clip_norm: the learning rate "
            "is too high; at zero: a network does not learn.",
            "none",
            (Query("max by (stage, network) (ray_diagonal_gradient_norm{STAGES})", "{{stage}}: {{network}}"),),
            width=12,
        ),
    ),
)

SPEED = Section(
    "Speed",
    (
        Panel(
            "How fast does it go?",
            "Updates a second: of the last minutes, and since the workers started. A fall: a slow "
            "node, or waiting for data; compare the panels beside.",
            "ops",
            (
                Query(
                    "sum by (stage, network) (rate(ray_diagonal_updates_total{STAGES}[$__rate_interval]))",
                    "{{stage}}: {{network}}",
                ),
                Query("max by (stage) (ray_diagonal_updates_per_second{STAGES})", "{{stage}}: since its start"),
            ),
        ),
        Panel(
            "How long does an update take?",
            "The higher line far above the lower: some updates are slow, such as those in "
            "which the generator learns too, or a checkpoint is waited for.",
            "s",
            quantiles("ray_diagonal_update_seconds_bucket{STAGES}", "le, stage", "{{stage}}: ", 0.5, 0.95),
        ),
        Panel(
            "Are the GPUs used well?",
            "Operations that updates need over what the hardware allows (MFU; only on hardware "
            "whose peak is known). Below 30 %: a small batch, waiting for data, or a slow network between nodes.",
            "percentunit",
            (Query("max by (stage) (ray_diagonal_model_flops_utilisation_ratio{STAGES})", "{{stage}}"),),
            top=1,
        ),
        Panel(
            "How much is computed?",
            "Floating-point operations of updates a second, of all workers. It should double with "
            "the workers; when it does not, look at the network between them.",
            "FLOPS",
            (Query("sum by (stage) (rate(ray_diagonal_model_flops_total{STAGES}[$__rate_interval]))", "{{stage}}"),),
        ),
        Panel(
            "How much does it see?",
            "Samples and latent tokens a second. Compare with the last run of the same settings; "
            "tokens fall with samples unless the clips became shorter.",
            "ops",
            (
                Query(
                    "sum by (stage) (rate(ray_diagonal_samples_total{STAGES}[$__rate_interval]))", "{{stage}}: samples"
                ),
                Query(
                    "sum by (stage) (rate(ray_diagonal_tokens_total{STAGES}[$__rate_interval]))", "{{stage}}: tokens"
                ),
            ),
        ),
        Panel(
            "What do checkpoints cost?",
            "95 % of checkpoints are written beside training within the first, and hold it up "
            "for the second. Writing longer than the interval: checkpoints are left out; use faster storage or a longer "
            "interval.",
            "s",
            (
                *quantiles(
                    "ray_diagonal_checkpoint_save_seconds_bucket{STAGES}", "le, stage", "{{stage}}: written, ", 0.95
                ),
                *quantiles(
                    "ray_diagonal_checkpoint_wait_seconds_bucket{STAGES}", "le, stage", "{{stage}}: waited, ", 0.95
                ),
            ),
        ),
        Panel(
            "When was the newest checkpoint made?",
            "Age of the newest whole checkpoint, and the interval at the present rate. "
            "Past two intervals: see the runbook under No checkpoint.",
            "s",
            (
                Query("max by (stage) (ray_diagonal_checkpoint_age_seconds{STAGES})", "{{stage}}: age"),
                Query("max by (stage) (ray_diagonal_checkpoint_interval_seconds{STAGES})", "{{stage}}: interval"),
            ),
        ),
    ),
)

BOARD = Board(
    "training",
    "Diagonal: training",
    "Is the model still learning, and how fast?",
    (Variable("stage", "Job", "ray_diagonal_updates_total"),),
    (PROGRESS, LEARNING, SPEED),
    {"STAGES": 'stage=~"$stage"'},
    since="now-6h",
)
