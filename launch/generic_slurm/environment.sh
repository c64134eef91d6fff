# Nothing is assumed about the machine. What your site needs for its network goes here, each with its reason.
