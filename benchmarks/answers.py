"""One answer of the vendor's: a task that has succeeded, in its envelope."""

from typing import Any

ID = "829877301929783311"

TASK: dict[str, Any] = {
    "code": 0,
    "message": "SUCCEED",
    "request_id": "e2f3a4b5-0000-4c6d-8e7f-123456789abc",
    "data": {
        "task_id": ID,
        "task_status": "succeed",
        "task_status_msg": "",
        "task_info": {"external_task_id": "kv-0123456789abcdef0123456789abcdef"},
        "task_result": {
            "voices": [
                {
                    "voice_id": "929877301929783312",
                    "voice_name": "Ada",
                    "trial_url": "https://cdn.example.com/trials/829877301929783311.mp3?sign=0",
                    "owned_by": "28a1c7d2f0",
                }
            ]
        },
        "final_unit_deduction": "0.05",
        "final_balance_deduction": {"quota": "0.05", "list_price": "0.07"},
        "created_at": 1781080778802,
        "updated_at": 1781080787154,
    },
}
