"""Looking after a data set before it is prepared: what its files hold, what is wrong or can be mended, its splits."""
