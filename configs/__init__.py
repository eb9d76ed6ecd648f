"""Run configurations, one file a run; installed as pixelflow_jax.configs."""
