//! UDP that the mesh doesn't carry, as the programs count it by pod.

use aya::maps::PerCpuValues;

use super::CaptureError;
use super::kernel::{Kernel, map};
use super::layout::QUESTIONS;
use super::pods::cookie;
use crate::inpod::Netns;

/// Since the pod was enrolled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Datagrams {
    /// Connects and datagrams, in either direction.
    pub refused: u64,
    /// Flows.
    pub unprotected: u64,
}

impl Kernel {
    /// None for a pod that isn't captured.
    pub fn datagrams(&self, netns: &Netns) -> Result<Option<Datagrams>, CaptureError> {
        let Some(slot) = self.slot(cookie(netns)?) else {
            return Ok(None);
        };
        let counted = self.datagrams.get(&slot, 0);
        let counted = counted.map_err(|error| map("datagrams", &error))?;
        let sum = |index: usize| counted.iter().map(|of_cpu| of_cpu[index]).sum();
        Ok(Some(Datagrams {
            refused: sum(0),
            unprotected: sum(1),
        }))
    }

    /// The slot's last pod's aren't the next one's.
    pub(super) fn clear_datagrams(&mut self, slot: u32) -> Result<(), CaptureError> {
        let failed = |error: aya::maps::MapError| map("datagrams", &error);
        let cpus = self.datagrams.get(&slot, 0).map_err(failed)?.len();
        let zero = PerCpuValues::try_from(vec![[0; 2]; cpus]);
        let zero = zero.map_err(|error| CaptureError::Map("datagrams", error.to_string()))?;
        self.datagrams.set(slot, zero, 0).map_err(failed)
    }

    /// Most pods have none.
    pub(super) fn forget_questions(&mut self, slot: u32) {
        for bucket in 0..QUESTIONS {
            let _ = self.questions.remove(&[slot, bucket]);
        }
    }
}
