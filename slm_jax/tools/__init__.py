"""Tools around a run: report, bench, plan and doctor."""
