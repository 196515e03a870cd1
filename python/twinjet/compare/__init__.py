"""Two deployments side by side: interleaved runs, a noise floor, a verdict with an interval, and whether both said the same.

statistics, sameness, workload, analysis and report are pure; driver and targets run requests.
"""
