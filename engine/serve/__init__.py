"""The HTTP server, the engine process behind it, the offline API and the console command."""
