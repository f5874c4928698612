"""Where data sets come from: made CT that ships as code."""
