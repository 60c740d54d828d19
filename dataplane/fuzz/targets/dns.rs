//! A pod's packet to port 15053, and a nameserver's answer to it: the first two bytes tell how long
//! the packet is. Every answer is a response with the packet's id, and fits where it goes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use underpass_core::dns::fuzzing as dns;

fuzz_target!(|data: &[u8]| {
    let Some((length, rest)) = data.split_first_chunk::<2>() else {
        return;
    };
    let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
    let (packet, answer) = rest.split_at(length);
    // A nameserver that answers this very question, with the fuzzer's records.
    let mut fitting = packet.to_vec();
    if let Some(flags) = fitting.get_mut(2..4) {
        flags[0] |= 0x80;
        flags[1] &= 0xf0;
    }
    fitting.extend_from_slice(answer);
    if let Some((counts, records)) = answer.split_first_chunk::<6>()
        && fitting.len() >= 12
    {
        fitting[6..12].copy_from_slice(counts);
        fitting.truncate(packet.len());
        fitting.extend_from_slice(records);
    }
    for said in [answer, &fitting] {
        for (number, answer) in dns::ask(packet, said).iter().enumerate() {
            assert!(answer.len() >= 12, "answer {number} is cut: {answer:?}");
            assert_eq!(answer[..2], packet[..2], "answer {number} has another id");
            assert_ne!(answer[2] & 0x80, 0, "answer {number} is no response");
            if number == 1 {
                assert!(answer.len() <= dns::room(packet), "{} bytes", answer.len());
            }
        }
    }
});
