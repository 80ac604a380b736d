"""The process: flow, noise, rollout and the guided teacher."""
