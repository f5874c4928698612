"""Where data sets come from: published archives, which are downloaded, and made CT."""
