//! What things can be counted as: the closed sets behind labels.

/// How one exchange with a worker ended: the `outcome` label of `baton_router_hops_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HopOutcome {
    /// 2xx, to the end.
    Ok,
    /// No connection.
    Refused,
    /// 5xx, reset, nonsense.
    Failed,
    /// No answer in time.
    TimedOut,
    /// It had no room: 429, 503.
    Busy,
    /// A 4xx that went to the client.
    Rejected,
    /// One of the hand-over codes.
    Handover,
    /// The client left.
    Cancelled,
}

impl HopOutcome {
    /// All, in the order of declaration.
    pub const ALL: [Self; 8] = [
        Self::Ok,
        Self::Refused,
        Self::Failed,
        Self::TimedOut,
        Self::Busy,
        Self::Rejected,
        Self::Handover,
        Self::Cancelled,
    ];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
            Self::Busy => "busy",
            Self::Rejected => "rejected",
            Self::Handover => "handover",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Which route a request took: the `endpoint` label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Endpoint {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Completions, Self::Chat];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
        }
    }
}

/// How a reload ended: the `outcome` label of `baton_router_reloads_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReloadOutcome {
    /// There is a new table.
    Applied,
    /// Nothing differed.
    Unchanged,
    /// A mistake, or a key that needs a restart.
    Refused,
}

impl ReloadOutcome {
    /// All, in the order of declaration.
    pub const ALL: [Self; 3] = [Self::Applied, Self::Unchanged, Self::Refused];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Unchanged => "unchanged",
            Self::Refused => "refused",
        }
    }
}

/// How a request ended: the `outcome` label of `baton_router_requests_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestOutcome {
    /// 2xx, to the end.
    Ok,
    /// 4xx.
    ClientError,
    /// 5xx.
    ServerError,
    /// The answer broke off after its head.
    Aborted,
    /// The client left.
    ClientGone,
}

impl RequestOutcome {
    /// All, in the order of declaration.
    pub const ALL: [Self; 5] =
        [Self::Ok, Self::ClientError, Self::ServerError, Self::Aborted, Self::ClientGone];

    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientError => "client_error",
            Self::ServerError => "server_error",
            Self::Aborted => "aborted",
            Self::ClientGone => "client_gone",
        }
    }
}
