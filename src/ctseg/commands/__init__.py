"""One thin file per subcommand: cheap checks, then the engine, then the result on stdout."""
