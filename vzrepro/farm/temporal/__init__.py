"""The queue on Temporal: `workflow` is what the server keeps, `worker` serves, `client` orders, `server` is the
connection, `overview` what is shown. Nothing else imports temporalio, and who has no farm never does.
"""
