"""From raw pages and pictures to shards: drafts, counted filters, web rules, the HTML reader, the writer."""
