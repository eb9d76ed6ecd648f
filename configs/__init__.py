"""Run configurations, one file per run; installed as pixelflow_jax.configs."""
