# SPDX-License-Identifier: Apache-2.0
"""A page to look at a running server: answers that stream in coloured by their k, and live charts of its metrics.

`adaptive-k playground` serves it. The browser talks to this page's own small server, and that to Triton: by gRPC for
answers, by HTTP for metrics. Everything that the page needs is in `static`; it loads nothing from elsewhere.
"""
