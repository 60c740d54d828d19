//! What would happen to a connection, step by step, without sending anything. Every decision is made
//! by the code that decides for connections (`state::resolve`, `policy`); here it is only put into
//! words, and what another node alone knows is said to be unknown.

mod inbound;
mod outbound;
mod source;
mod steps;
mod target;

#[cfg(test)]
mod tests;

use crate::config::Config;
use crate::state::Snapshot;
use crate::tls::CertStatus;
use crate::wire::control as pb;

use source::Source;
use steps::Steps;
use target::Wanted;

/// What this node knows.
pub struct Known<'a> {
    pub snapshot: &'a Snapshot,
    pub config: &'a Config,
    pub certificates: &'a [CertStatus],
    pub pods: &'a [pb::PodStatus],
}

/// The question makes no sense here.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unclear {
    #[error("no pod here and no workload of the mesh is called so: see underpass workloads")]
    NoSource(String),
    #[error("several are called so; name one of {1}")]
    Ambiguous(String, String),
    #[error("`{0}` is not of the form IP:PORT or HOSTNAME:PORT")]
    Destination(String),
}

impl Unclear {
    /// The part of the question that is meant.
    pub fn subject(&self) -> &str {
        match self {
            Self::NoSource(text) | Self::Ambiguous(text, _) | Self::Destination(text) => text,
        }
    }
}

impl<'a> Known<'a> {
    pub fn explain(&self, ask: &pb::Explain) -> Result<pb::ExplainReply, Unclear> {
        let wanted = Wanted::parse(&ask.destination)?;
        let source = Source::find(self, &ask.source)?;
        let mut steps = Steps::default();
        let Some(caller) = source.caller(self, &mut steps) else {
            return Ok(steps.end());
        };
        if let Some(dst) = wanted.resolve(self, &caller, &mut steps) {
            match caller.captured {
                true => outbound::captured(self, &caller, dst, &mut steps),
                false => outbound::plain(self, &caller, dst, &mut steps),
            }
        }
        Ok(steps.end())
    }

    /// The pod's place in this data plane, by its record's uid.
    fn pod_of(&self, workload_uid: &str) -> Option<&'a pb::PodStatus> {
        let mut pods = self.pods.iter();
        pods.find(|pod| pod.workload_uid == workload_uid && up(pod))
    }
}

fn up(pod: &pb::PodStatus) -> bool {
    pod.state() == pb::pod_status::State::Up
}
