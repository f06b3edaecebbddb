"""What boots: bundles, and the machines and containers that run in them. Knows nothing of builds."""
