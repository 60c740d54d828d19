//! The allocator, and how soon it gives memory back: a push of configuration leaves a peak behind
//! that the node should have again within seconds.

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A thread of its own returns unused pages, so that idle workers hold none. Four arenas: workers
/// share little, and each arena keeps memory of its own.
#[allow(unsafe_code)] // jemalloc reads its settings from a symbol of this name, before `main`
#[unsafe(export_name = "_rjem_malloc_conf")]
static SETTINGS: &[u8; 73] =
    b"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0,narenas:4\0\0\0\0";
