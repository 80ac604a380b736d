"""How sessions run on one device: state, budget, schedule, loop."""
