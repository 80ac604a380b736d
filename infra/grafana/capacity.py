"""The dashboard *Capacity*: how much room is left, and what takes it?"""

from __future__ import annotations

from infra.grafana.panels import BAD, WORSE, Board, Panel, Query, Section, Variable, lately, rate_quantiles

ROOM = Section(
    "Room",
    (
        Panel(
            "How many more viewers fit?",
            "Sessions that replicas could still admit. At zero the next viewer gets a 429: "
            "raise max_replicas or add GPU nodes. Free places with rejections beside them: the time budget is used up, not "
            "memory.",
            "short",
            (Query("sum(ray_diagonal_sessions_free{REPLICAS})", "free places"),),
            limits=((0.0, BAD), (1.0, "green")),
            big=True,
            width=6,
        ),
        Panel(
            "How full is the cache?",
            "Key and value cache held by sessions over what the pools can hold, the fullest "
            "replica. Above 90 % new viewers are refused soon: more replicas, or options: cache_dtype=fp8.",
            "percentunit",
            (Query("max(diagonal:kv_cache_used:ratio{REPLICAS})", "fullest replica"),),
            limits=((0.75, WORSE), (0.9, BAD)),
            big=True,
            width=6,
            top=1,
        ),
        Panel(
            "How much of its time is promised?",
            "Predicted busy time for each second of media of the sessions that play, and "
            "the limit for one more. At the limit a replica admits nobody: add replicas, or a schedule with fewer steps.",
            "percentunit",
            (
                Query("max(ray_diagonal_budget_used_ratio{REPLICAS})", "busiest replica"),
                Query("min(ray_diagonal_budget_limit_ratio{REPLICAS})", "limit"),
            ),
            big=True,
            width=6,
        ),
        Panel(
            "Are as many replicas up as wanted?",
            "Parts of the service that are healthy, that are wanted, and started "
            "in an hour. Fewer than "
            "wanted for long: no node with a free GPU, or a release that does not load; `serve status` says which. Many "
            "starts: see the runbook under Replicas restart.",
            "short",
            (
                Query("sum(ray_serve_deployment_replica_healthy{REPLICAS})", "healthy"),
                Query("sum(ray_serve_autoscaling_target_replicas{REPLICAS})", "wanted"),
                Query("sum" + lately("ray_serve_deployment_replica_starts_total{REPLICAS}", "1h"), "starts in an hour"),
            ),
            big=True,
            width=6,
        ),
    ),
)

LOAD = Section(
    "Load",
    (
        Panel(
            "Where are the sessions?",
            "Active, waiting, paused and free, over all replicas. Paused ones hold no cache; "
            "many of them keep snapshots in memory. Waiting for more than moments: replicas are overloaded.",
            "short",
            tuple(
                Query(f"sum(ray_diagonal_sessions_{kind}{{REPLICAS}})", kind)
                for kind in ("active", "waiting", "paused", "free")
            ),
        ),
        Panel(
            "Does autoscaling follow?",
            "Replicas that run, by deployment, and that the autoscaler aims at where it is on. "
            "Aim above what runs for minutes: there are no nodes. Aim at max_replicas with rejections: raise it.",
            "short",
            (
                Query("sum by (deployment) (ray_serve_deployment_replica_healthy{REPLICAS})", "{{deployment}}"),
                Query("max by (deployment) (ray_serve_autoscaling_target_replicas{REPLICAS})", "aim: {{deployment}}"),
            ),
        ),
        Panel(
            "How busy are the replicas?",
            "Share of time spent making chunks. Steadily above 85 %: chunks come late as "
            "soon as anything varies; add replicas.",
            "percentunit",
            (
                Query(
                    "sum by (deployment, replica) (rate(ray_diagonal_generation_busy_seconds_total{REPLICAS}"
                    "[$__rate_interval]))",
                    "{{deployment}} {{replica}}",
                ),
            ),
            limits=((0.85, WORSE),),
        ),
        Panel(
            "How much slack is left when a chunk is made?",
            "Media that a viewer still has when his next chunk is ready; 0 "
            "is late. The lowest twentieth near zero: stalls begin; fewer sessions for each replica (serve.max_sessions).",
            "s",
            rate_quantiles("ray_diagonal_playout_slack_seconds_bucket{REPLICAS}", "le", "", 0.05, 0.5),
        ),
        Panel(
            "Are replicas late?",
            "Share of time by which steps overran their bound. A busy machine or a CPU quota, not a lost replica: sessions "
            "stay, new ones are refused. Give the replica its cores back, or add replicas.",
            "percentunit",
            (
                Query(
                    "sum by (deployment, replica) (rate(ray_diagonal_engine_late_seconds_total{REPLICAS}[$__rate_interval]))",
                    "{{deployment}} {{replica}}",
                ),
            ),
            limits=((0.1, WORSE), (0.5, BAD)),
        ),
        Panel(
            "How long do chunks wait for their turn?",
            "From asking for a chunk to its generation. It grows before anything "
            "else does when a replica holds too many sessions: add replicas before it reaches a chunk's playing time.",
            "s",
            rate_quantiles("ray_diagonal_session_queue_seconds_bucket{REPLICAS}", "le", "", 0.5, 0.95),
        ),
        Panel(
            "Where does a chunk's time go?",
            "95 % of chunks are generated, encoded and kept within this. Generation slower "
            "than in the release's manifest: another program on the GPU, or heat. Encoding: more encode_threads or CPUs. "
            "Keeping: the store's disk.",
            "s",
            (
                Query(
                    "histogram_quantile(0.95, sum by (le) (rate(ray_diagonal_chunk_generation_seconds_bucket{REPLICAS}"
                    "[$__rate_interval])))",
                    "generated",
                ),
                Query(
                    "histogram_quantile(0.95, sum by (le) (rate(ray_diagonal_chunk_encode_seconds_bucket{REPLICAS}"
                    "[$__rate_interval])))",
                    "encoded",
                ),
                Query(
                    "histogram_quantile(0.95, sum by (le) (rate(ray_diagonal_store_write_seconds_bucket{APPLICATION}"
                    "[$__rate_interval])))",
                    "kept by the store",
                ),
            ),
        ),
    ),
)

WORK = Section(
    "Work and moves",
    (
        Panel(
            "What does a frame cost?",
            "Forwards of the transformer for each pixel frame made. It is set by the schedule "
            "and the viewers' changes of prompt; a jump without a new release is repeated work after moves.",
            "none",
            (
                Query(
                    "sum by (deployment) (rate(ray_diagonal_model_forward_calls_total{REPLICAS}[$__rate_interval])) / "
                    "sum by (deployment) (rate(ray_diagonal_frames_generated_total{REPLICAS}[$__rate_interval]))",
                    "{{deployment}}",
                ),
            ),
        ),
        Panel(
            "Which work is done twice?",
            "In ten minutes. Caches written anew: for a new prompt, or for a session that comes back. Sessions "
            "admitted with a shorter schedule: the service is overloaded and trades looks for time; add replicas.",
            "short",
            (
                Query("sum by (reason) " + lately("ray_diagonal_recaches_total{REPLICAS}"), "cache: {{reason}}"),
                Query("sum" + lately("ray_diagonal_schedules_shortened_total{REPLICAS}"), "shorter schedules"),
            ),
        ),
        Panel(
            "Do sessions move, and do they arrive?",
            "Sessions taken from a replica in ten minutes, by why and what came "
            "of it. Moves "
            "in an upgrade or after a lost node are expected; any that fail are viewers who were cut off: see the runbook.",
            "short",
            (
                Query(
                    "sum by (cause, outcome) " + lately("ray_diagonal_session_migrations_total{APPLICATION}"),
                    "{{cause}}: {{outcome}}",
                ),
            ),
        ),
    ),
)

MEMORY = Section(
    "Memory and disks",
    (
        Panel(
            "What holds the replicas' memory?",
            "Caches, their limit, decoder states of sessions with a cache, and "
            "snapshots of paused ones. Snapshots that only grow: viewers leave without closing; shorten resume_window_s.",
            "bytes",
            (
                Query("sum(ray_diagonal_kv_cache_bytes{REPLICAS})", "caches"),
                Query("sum(ray_diagonal_kv_cache_capacity_bytes{REPLICAS})", "room for caches"),
                Query("sum(ray_diagonal_session_state_bytes{REPLICAS})", "decoder states"),
                Query("sum(ray_diagonal_snapshot_bytes{REPLICAS})", "snapshots"),
            ),
        ),
        Panel(
            "Do the nodes have memory left?",
            "Host memory in use, by node. Above 95 % Ray ends workers: fewer sessions "
            "on the node, a smaller object store, or more memory.",
            "percentunit",
            (Query("max by (ip) (ray_node_mem_used / ray_node_mem_total)", "{{ip}}"),),
            limits=((0.8, WORSE), (0.95, BAD)),
            top=1,
        ),
        Panel(
            "Do the disks have room left?",
            "Disks in use, by node; the store's node first of all. Above 90 % shorten "
            "retention_s or grow the volume: a full disk ends streams. See the runbook under Full disk.",
            "percentunit",
            (Query("max by (ip) (ray_node_disk_utilization_percentage / 100)", "{{ip}}"),),
            limits=((0.8, WORSE), (0.9, BAD)),
            top=1,
        ),
    ),
)

BOARD = Board(
    "capacity",
    "Diagonal: capacity",
    "How much room is left, and what takes it?",
    (
        Variable("application", "Application", "ray_diagonal_sessions_active"),
        Variable("deployment", "Release (deployment)", "ray_diagonal_sessions_active", '{application=~"$application"}'),
    ),
    (ROOM, LOAD, WORK, MEMORY),
    {"REPLICAS": 'application=~"$application",deployment=~"$deployment"', "APPLICATION": 'application=~"$application"'},
)
