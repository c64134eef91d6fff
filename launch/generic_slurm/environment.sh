# Nothing is assumed about the machine. Variables that your site's network needs go here, each with its reason.
