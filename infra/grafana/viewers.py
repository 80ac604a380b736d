"""The dashboard *Viewers*: are people getting frames?"""

from __future__ import annotations

from infra.grafana.panels import BAD, WORSE, Board, Panel, Query, Section, Variable, lately, quantiles, rate_quantiles

NOW = Section(
    "Now",
    (
        Panel(
            "How many are watching?",
            "Sessions that hold a cache, wait for their next chunk, or are paused. Many that "
            "wait while few are active: a replica hangs; see Capacity, and the runbook under Lost node.",
            "short",
            (
                Query("sum(ray_diagonal_sessions_active{SERVED})", "active"),
                Query("sum(ray_diagonal_sessions_waiting{SERVED})", "waiting"),
                Query("sum(ray_diagonal_sessions_paused{SERVED})", "paused"),
            ),
            big=True,
            width=6,
        ),
        Panel(
            "Do 99 % get their first frame within two seconds?",
            "Share of streams whose first frame took longer than 2 s, "
            "over an hour; 1 % is promised. Above it: look for rejections and for slack on Capacity, then for a cold "
            "replica.",
            "percentunit",
            (Query("diagonal:first_frame_late:ratio_1h{SERVED}", "late first frames"),),
            limits=((0.01, WORSE), (0.1, BAD)),
            big=True,
            width=6,
        ),
        Panel(
            "Does playback run without stalls?",
            "Seconds that players waited over seconds of media sent, over an hour; 1 % "
            "is promised. Above it: compare the real-time factor below with the time that chunks wait on Capacity.",
            "percentunit",
            (Query("diagonal:stream_stalled:ratio_1h{SERVED}", "time stalled"),),
            limits=((0.01, WORSE), (0.1, BAD)),
            big=True,
            width=6,
        ),
        Panel(
            "Is video made faster than it is watched?",
            "Media made over time spent making it, of each release's "
            "replicas. Below 1 a replica is too slow for even one viewer: compare with the release's manifest, look for "
            "another program on the GPU, roll the release back.",
            "none",
            (Query("diagonal:real_time_factor:ratio_5m{SERVED}", "{{deployment}}"),),
            limits=((0.0, BAD), (1.0, WORSE), (1.5, "green")),
            big=True,
            width=6,
        ),
    ),
)

WAITING = Section(
    "Waiting",
    (
        Panel(
            "How long does the first frame take?",
            "From the request to the first byte of video. A rise of all lines is "
            "queueing: add replicas. A rise of the highest alone is a cold replica or a new release.",
            "s",
            quantiles("ray_diagonal_time_to_first_frame_seconds_bucket{SERVED}", "le", "", 0.5, 0.95, 0.99),
            limits=((2.0, BAD),),
        ),
        Panel(
            "How regularly do chunks arrive?",
            "Time between two chunks sent to one viewer; a chunk of the trained size "
            "plays for about 0.75 s. Above that, its playback will stall: look at slack and at busy time on Capacity.",
            "s",
            rate_quantiles("ray_diagonal_chunk_interval_seconds_bucket{SERVED}", "le", "", 0.5, 0.99),
        ),
        Panel(
            "How soon does a new prompt show?",
            "From a change of prompt to the first chunk made with it. It waits for the "
            "chunk under way and for a new cache; when it rises with the number of viewers, there are too many of them.",
            "s",
            quantiles("ray_diagonal_prompt_update_latency_seconds_bucket{SERVED}", "le", "", 0.5, 0.95),
        ),
    ),
)

PLAYBACK = Section(
    "Playback",
    (
        Panel(
            "Do as many frames go out as are made?",
            "Frames made, and frames sent: one made is sent once for each "
            "reader. Sent far below made: viewers are gone or read slowly; both at zero with viewers active: a replica "
            "hangs.",
            "fps",
            (
                Query("sum(rate(ray_diagonal_frames_generated_total{SERVED}[$__rate_interval]))", "made"),
                Query("sum(rate(ray_diagonal_frames_sent_total{SERVED}[$__rate_interval]))", "sent"),
                Query("avg(ray_diagonal_generation_frames_per_second{SERVED})", "a replica's newest chunk"),
            ),
        ),
        Panel(
            "How often does playback stop?",
            "Stalls in an hour of media sent. A few are a viewer's own network; when many "
            "viewers stall at once, the service is late: see slack on Capacity.",
            "short",
            (
                Query(
                    "3600 * sum(rate(ray_diagonal_stream_stalls_total{SERVED}[$__rate_interval])) / "
                    "sum(rate(ray_diagonal_stream_media_seconds_total{SERVED}[$__rate_interval]))",
                    "stalls an hour",
                ),
            ),
        ),
        Panel(
            "How much video is ahead of the viewers?",
            "Media in front of the player when its next chunk is asked for. Near "
            "zero, the next delay is a stall: reduce load. Far above the buffer asked for: readers that do not tell their "
            "position.",
            "s",
            rate_quantiles("ray_diagonal_send_window_media_seconds_bucket{SERVED}", "le", "", 0.05, 0.5),
        ),
    ),
)

WRONG = Section(
    "What went wrong",
    (
        Panel(
            "Who is turned away, and why?",
            "Requests refused for lack of room (429), in ten minutes. `full`, `budget`: "
            "add replicas or "
            "raise max_replicas. `quota`: a caller's own limit. Prompts refused by anything but `policy`: the "
            "policy itself fails, and everybody is refused.",
            "short",
            (
                Query("sum by (reason) " + lately("ray_diagonal_rejected_total{SERVED}"), "{{reason}}"),
                Query("sum by (reason) " + lately("ray_diagonal_prompts_refused_total{SERVED}"), "prompt: {{reason}}"),
            ),
        ),
        Panel(
            "Which answers are errors?",
            "Problems that gateways answered with in ten minutes, by their code; a caller's "
            "mistakes "
            "are among them. Look for `internal_error` and `unavailable`, and search the gateways' log for the request_id.",
            "short",
            (Query("sum by (code) " + lately("ray_diagonal_errors_total{SERVED}"), "{{code}}"),),
        ),
        Panel(
            "How do sessions end?",
            "In ten minutes; `completed`, `cancelled` and `moved` are normal. Failures carry "
            "their code: three in a row "
            "make a replica start again; one code on all replicas points at the release, on one replica at its GPU.",
            "short",
            (
                Query("sum by (outcome) " + lately("ray_diagonal_sessions_total{SERVED}"), "{{outcome}}"),
                Query("sum by (code) " + lately("ray_diagonal_session_failures_total{SERVED}"), "failed: {{code}}"),
            ),
        ),
        Panel(
            "Do long streams keep their looks?",
            "Measures of a chunk over those of the stream's first chunks; 1 is no "
            "drift. Saturation that leaves 0.8 to 1.25 in the middle of streams: shorten max_stream_s and train or "
            "choose another release.",
            "none",
            rate_quantiles(
                "ray_diagonal_stream_drift_ratio_bucket{SERVED}", "le, measure", "{{measure}}, ", 0.05, 0.5, 0.95
            ),
            width=12,
        ),
        Panel(
            "Does Ray Serve itself report errors?",
            "What Serve's proxies answered in ten minutes, and errors by code. "
            "Normal ends of WebSockets, which Serve counts as errors, and callers' mistakes are left out of those. "
            "What is left is a gateway that fails: read its log.",
            "short",
            (
                Query(
                    "sum by (status_code) " + lately("ray_serve_num_http_requests_total{SERVED}"),
                    "answered {{status_code}}",
                ),
                Query(
                    "sum by (error_code) "
                    + lately(
                        "ray_serve_num_http_error_requests_total{SERVED,error_code!~"
                        '"1000|1001|1003|1005|1008|1009|1012|1013|4001|4.."}'
                    ),
                    "error {{error_code}}",
                ),
            ),
            width=12,
        ),
    ),
)

BOARD = Board(
    "viewers",
    "Diagonal: viewers",
    "Are people getting frames?",
    (Variable("application", "Application", "ray_diagonal_sessions_active"),),
    (NOW, WAITING, PLAYBACK, WRONG),
    {"SERVED": 'application=~"$application"'},
)
